"""The form of the page, without a browser: what is filled in, what is drawn, what repeats it."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from cascade import testing
from cascade.commands import serve
from cascade.errors import UserError
from cascade.runner import easel, form
from cascade.runner.cascade import Cascade


@pytest.fixture(scope="module")
def model():
    """8 -> 16 px, which are quick."""
    whole = testing.cascade()
    return Cascade(whole.stages[:2], whole.encoder, name="testing")


def filled(model, **fields):
    """The form of somebody who has filled in so much."""
    given = {"prompt": "a red b", **fields}
    return form.Form(**{**vars(form.empty(model)), **given})


def drawn(model, filled_in, folder):
    """What the page draws: pictures as files."""
    *_, end = easel.Drawing(model, filled_in, folder).states()
    assert end.error == "" and end.ended
    return end.drawn


def pixels(one):
    return {side: np.asarray(Image.open(file)) for side, file in one.files.items()}


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[side], b[side]) for side in a)


def test_an_empty_form_shows_the_models_own_values_and_draws_as_python_does(model, tmp_path):
    empty = form.empty(model)
    assert (empty.steps, empty.guidance, empty.aug_level) == (("3", "2"), ("2.0", "1.0"), ("0.1",))
    assert empty.until == 16 and empty.settings == tuple(model.settings)
    (one,) = drawn(model, filled(model, seed=5), tmp_path)
    assert same(pixels(one), model("a red b", seed=5)[0].images)
    assert [side for side, _ in one.frames] == [8] * 3 + [16] * 2
    for _, file in one.frames:
        Image.open(file).verify()


def test_fields_are_the_options_of_draw(model):
    given = form.options(
        filled(
            model,
            seed=3,
            num=2,
            until=8,
            negative="c",
            steps=("4", "9"),
            guidance=("3.5", "1"),
            strength=" ",
        ),
        model,
    )
    (picture, second) = model.draw(**given)
    base = picture.metadata["stages"]["base8"]
    assert (base["steps"], base["guidance"]) == (4, 3.5)
    assert (picture.metadata["negative"], second.seed, max(picture.images)) == ("c", 4, 8)
    assert set(picture.metadata["stages"]) == {"base8"}


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"prompt": " "}, "the prompt is empty; write what to draw"),
        ({"seed": None}, "seed=None: must be a whole number, 0 or more"),
        ({"seed": 2**32}, "seed=4294967296: the last of 1 pictures would have seed 4294967296"),
        ({"num": 0}, "num=0: must be 1 or more"),
        ({"num": 17}, "num=17: must be at most 16 in the page"),
        ({"num": 1.5}, "num=1.5: must be a whole number"),
        ({"steps": ("x", "2")}, "steps='x': must be a whole number, entries of a table"),
        ({"steps": ("2", "1001")}, "steps='1001': must be at most 1000 in the page"),
        ({"steps": ("", "2")}, "steps=('', '2'): value 1 is empty"),
        ({"guidance": ("-1", "2")}, "guidance='-1': must be 0 or more"),
        ({"aug_level": ("2",)}, "aug_level='2': must be in [0, 1]"),
        ({"strength": "0.5"}, "strength: goes with init"),
        ({"mask": np.full((9, 9), 255, np.uint8)}, "mask: goes with init"),
    ],
)
def test_what_cannot_be_drawn_is_said_as_python_says_it(model, tmp_path, fields, message):
    with pytest.raises(UserError) as e:
        easel.Drawing(model, filled(model, **fields), tmp_path)
    assert message in str(e.value) and not list(tmp_path.iterdir())


def test_a_picture_is_repeated_from_its_json_bit_for_bit(model, tmp_path):
    """With the settings that the form does not show."""
    first = filled(
        model,
        seed=7,
        num=2,
        negative="c d",
        steps=("4", "3"),
        guidance=("2.7", "1.1"),
        aug_level=("0.3",),
    )
    _, one = drawn(model, first, tmp_path / "first")
    again, notes = form.repeating(json.loads(one.json.read_text()), model)
    assert notes == []
    assert (again.prompt, again.negative, again.seed, again.num) == ("a red b", "c d", 8, 1)
    assert (again.steps, again.guidance, again.aug_level) == (("4", "3"), ("2.7", "1.1"), ("0.3",))
    (repeated,) = drawn(model, again, tmp_path / "again")
    assert same(pixels(repeated), pixels(one))
    assert json.loads(repeated.json.read_text()) == json.loads(one.json.read_text())


def test_a_picture_of_python_and_the_command_is_repeated_with_all_its_settings(model, tmp_path):
    options = {"sampler": "ddim:0.5", "grid": "karras", "threshold": "dynamic:0.9:1.5"}
    picture = model("a red b", seed=2, rescale=0.3, until=8, **options)[0]
    again, _ = form.repeating(json.loads(json.dumps(picture.metadata)), model)
    assert again.until == 8
    (repeated,) = drawn(model, again, tmp_path)
    assert same(pixels(repeated), picture.images)


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_that_began_from_another_is_repeated_too(model, tmp_path, masked):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    layer = np.zeros((20, 30, 4), np.uint8)
    layer[:10, :, [0, 2, 3]] = 255  # magenta, as the brush paints
    init, mask = form.begun_from(png(noise), [png(layer)] if masked else [], 16)
    assert init.shape == (16, 16, 3)
    if masked:
        assert mask[:7].min() == 255 and mask[9:].max() == 0
    else:
        assert mask is None
    first = filled(model, init=init, mask=mask, strength="0.7,0.9")
    (one,) = drawn(model, first, tmp_path / "first")
    again, notes = form.repeating(json.loads(one.json.read_text()), model)
    assert again.strength == "0.7,0.9" and notes == []
    (repeated,) = drawn(model, again, tmp_path / "again")
    assert same(pixels(repeated), pixels(one))
    (plain,) = drawn(model, filled(model), tmp_path / "plain")
    assert not same(pixels(plain), pixels(one))


def test_what_makes_a_repeated_picture_differ_is_said(model):
    metadata = model("a", until=8)[0].metadata
    told = {
        "edited": {"masked": False, "strength": {"base8": 0.7}},
        "versions": {"jax": "0.0.1"},
        "text_encoder": "other",
        "t5_int8": True,
    }
    _, notes = form.repeating(metadata | told, model)
    assert "this picture began from another one" in notes[0]
    assert "jax 0.0.1 drew this picture, and" in notes[1]
    assert "--text-encoder" in notes[2] and "--t5-int8" in notes[3]


@pytest.mark.parametrize(
    "change,message",
    [
        ([], "this JSON is not of a picture"),
        ({"stages": 3}, "this JSON is not of a picture"),
        ({"stages": {}}, "this picture was drawn by the stages '', and this model"),
        ({"stages": {"sr99": {}}}, "this picture was drawn by the stages 'sr99', and this"),
        ({"model_sha256": "0"}, "this picture is of another model, 'testing', than the one"),
        ({"from_lowres": True}, "this picture was drawn from a smaller one, which its JSON does"),
        ({"from_noise": True}, "this picture was drawn from noise, which its JSON does not hold"),
        ({"prompt": 3}, "prompt and negative must be texts"),
        ({"negative": 3}, "prompt and negative must be texts"),
        ({"seed": True}, "seed must be a whole number"),
        ({"edited": {"strength": {"base8": "x"}}}, "edited.strength must have a number"),
        ({"init_png": 3}, "init_png must be a PNG in base64"),
        ({"init_png": "&"}, "init_png must be a PNG in base64"),
        ({"mask_png": "abcd"}, "mask_png cannot be read as an image"),
        ({"stages": {"base8": {"steps": "x"}}}, "stages.base8.steps must be int"),
        ({"stages": {"base8": {"sampler": {"type": "os.x"}}}}, "stages.base8.sampler.type"),
        ({"stages": {"base8": 3}}, "stages.base8 must be a Sampling"),
    ],
)
def test_a_json_of_anybody_is_refused_in_a_sentence(model, change, message):
    metadata = model("a", until=8)[0].metadata
    record = change if isinstance(change, list) else metadata | change
    with pytest.raises(UserError) as e:
        form.repeating(record, model)
    assert message in str(e.value)


@pytest.mark.parametrize("where", ["the picture to begin from", "the painted mask"])
def test_what_is_no_image_is_refused_in_a_sentence(where):
    files = (b"no image", []) if "begin" in where else (None, [b"no image"])
    with pytest.raises(UserError, match=f"{where} cannot be read as an image"):
        form.begun_from(*files, 16)


def test_a_drawing_that_is_stopped_ends_and_keeps_what_is_drawn(model, tmp_path):
    begun = easel.Drawing(model, filled(model, num=5, steps=("50", "2")), tmp_path)
    for state in begun.states():
        if state.drawn:
            begun.stop()
    assert state.error == "stopped" and 1 <= len(state.drawn) < 5
    assert drawn(model, filled(model, until=8), tmp_path / "next")


def test_one_drawing_is_made_at_a_time_and_all_are_ended_together(model, tmp_path):
    first, second, third = (
        easel.Drawing(model, filled(model, num=16, steps=("900", "2")), tmp_path / name)
        for name in "abc"
    )
    assert [next(one.states()).before for one in (first, second, third)] == [0, 1, 2]
    second.stop()
    assert second.ends(60.0) and next(third.states()).before == 1
    assert easel.end_all(60.0)
    assert [one.state.error for one in (first, second, third)] == ["stopped"] * 3


def test_a_drawing_tells_of_each_stage_and_of_words_that_no_one_knows(model, tmp_path):
    known = Cascade(model.stages, model.encoder, known_words=["a", "b"])
    seen = []
    begun = easel.Drawing(known, filled(model), tmp_path)
    for state in begun.states(0.01):
        if state.progress is not None:
            seen.append(state.progress.resolution)
            assert 0 <= state.progress.step <= state.progress.steps
    assert sorted(set(seen)) == [8, 16] == state.sides
    assert state.notes == ["not in the captions that  was trained on: red"]


def test_help_states_the_limits(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"at most {form.MOST_PICTURES} pictures, in at most {form.MOST_STEPS} steps" in said
    page = pytest.importorskip("cascade.runner.page")
    assert f"at most {page.MOST_BYTES >> 20} MiB" in said
