"""What a person writes in Python: options by stage, pictures of any kind, errors that say the way
out."""

import dataclasses
import inspect
import pydoc
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

import cascade as package
from cascade import images, testing
from cascade.diffusion import samplers
from cascade.diffusion.denoise import Threshold
from cascade.errors import OptionError, UserError
from cascade.models import AutoencoderConfig
from cascade.runner import inputs
from cascade.runner.cascade import Cascade
from cascade.runner.edits import edits
from cascade.stage import Latents, Stage


@pytest.fixture(scope="module")
def model():
    """testing.cascade(), of the smallest networks: what is asked here is not what they draw."""
    network = testing.smallest_stage().network
    configs = [dataclasses.replace(c, network=network) for c in testing.stage_configs()]
    stages = [(Stage(c), testing.lively(Stage(c))) for c in configs]
    return Cascade(stages, testing.FakeEncoder(), name="testing")


@pytest.fixture(scope="module")
def picture():
    """A picture of any size, of noise."""
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def settings(of, **options):
    return next(of.draw("a b", until=16, **options)).metadata["stages"]


def kind(stage):
    """The name of its sampler's class."""
    return stage["sampler"]["type"].rpartition(".")[2]


# Options by stage.


def test_samplers_of_diffusers_own_have_words_that_take_numbers_too(model):
    got = settings(model, steps=2, sampler="ddim-predicted:0.5,heun-noise:0.2", threshold="static")
    base, above = got["base8"]["sampler"], got["sr16"]["sampler"]
    assert (base["eps"], base["eta"]) == ("predicted", 0.5)
    assert (above["slope"], above["churn"]) == ("noise", 0.2)


def test_options_by_stage_are_those_of_the_command_line(model):
    options = {"steps": 2, "guidance": [3.0, 1.0, 9.0], "rescale": (0.5, 0), "aug_level": 0.25}
    got = settings(model, **options, sampler="ddim:0.5,heun", threshold=["static", "none"])
    base, above = got["base8"], got["sr16"]
    assert (base["steps"], above["steps"]) == (2, 2)
    assert (base["guidance"], above["guidance"]) == (3.0, 1.0)
    assert (base["guidance_rescale"], above["guidance_rescale"]) == (0.5, 0.0)
    assert (base["aug_level"], above["aug_level"]) == (0.0, 0.25)
    assert (kind(base), base["sampler"]["eta"]) == ("DDIM", 0.5)
    assert (kind(above), above["threshold"]["kind"]) == ("Heun", "none")


def test_options_by_stage_decide_what_is_drawn(model):
    own, guided, as_settings = (
        model("red", until=8, seed=3, **options)[0].image
        for options in (
            {},
            {"guidance": 9},
            {"settings": [dataclasses.replace(model.settings[0], guidance=9.0)]},
        )
    )
    assert not np.array_equal(own, guided)
    assert np.array_equal(own, model("red", until=8, seed=3, settings=model.settings[:1])[0].image)
    np.testing.assert_array_equal(guided, as_settings)


def test_options_are_laid_over_the_settings_that_are_given(model):
    given = [dataclasses.replace(s, steps=7, sampler=samplers.DDIM()) for s in model.settings[:2]]
    got = settings(model, settings=given, steps=[1, 2])
    assert [got[name]["steps"] for name in ("base8", "sr16")] == [1, 2]
    assert {kind(stage) for stage in got.values()} == {"DDIM"}


# Errors.


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": [4, 5]}, "steps=[4, 5]: 2 values for 3 stages (base8, sr16, sr32); give one"),
        ({"steps": []}, "steps=[]: 0 values for 3 stages"),
        ({"steps": 0}, "steps=0: must be at least 1, got 0"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"guidance": -1.0}, "guidance=-1: must be 0 or more"),
        ({"guidance": [1, "x", 2]}, "guidance='x': must be a number, such as 0.5, got 'x'"),
        ({"rescale": 2}, "rescale=2: must be in [0, 1]"),
        ({"aug_level": 0.1, "until": 8}, "aug_level=0.1: no super-resolution stage draws"),
        ({"sampler": "euler"}, "sampler='euler': must be one of ancestral, ddim"),
        ({"until": 64}, "until=64: this model draws 8, 16, 32 px"),
        ({"num": 0}, "num=0: must be 1 or more"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"seed": [0, -1]}, "seed: 2 for 1 prompt; give one for each"),
        ({"seed": [-1]}, "seed=-1: must be 0 or more"),
        ({"seed": 2**32 - 1, "num": 2}, "the last of 2 pictures would have seed 4294967296"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"batch_size": 4097}, "batch_size=4097: must be at most 4096"),
        ({"split_rows": 0}, "split_rows=0: must be 1 or more"),
        ({"frames": -1}, "frames=-1: must be 0 or more"),
        ({"strength": 0.5}, "strength: goes with init"),
    ],
)
def test_what_cannot_be_drawn_is_told_when_it_is_asked_for(model, options, message):
    """By `draw` itself, not when the first picture is taken."""
    with pytest.raises(UserError) as e:
        model.draw("a b", **options)
    assert message in str(e.value)


def test_a_model_that_only_enlarges_asks_for_a_picture(model):
    above = Cascade(model.stages[1:], model.encoder)
    with pytest.raises(OptionError, match="lowres=None: this model only enlarges") as e:
        above.draw("a b")
    assert e.value.on_command_line == "--lowres: this model only enlarges pictures; give it one"


@pytest.mark.parametrize("prompts", [[], [""], ["a", " "]])
def test_prompts_say_something(model, prompts):
    with pytest.raises(ValueError, match="nothing to draw: give a prompt|prompt (2 )?is empty"):
        model.draw(prompts)


def test_a_picture_that_does_not_fit_is_told(model, picture):
    small, mask = np.zeros((8, 8, 3), np.uint8), np.full((20, 30), 255, np.uint8)
    for options, message in (
        ({"lowres": small, "until": 8}, "until=8: the lowres picture has that side already"),
        ({"lowres": [small] * 3}, "lowres: 3 pictures for 2 prompts; give one for each, or a"),
        ({"lowres": [small, picture]}, "lowres: must be pictures of one size, got 16x16, 8x8 px"),
        ({"init": [picture] * 3}, "init: 3 pictures for 2 prompts"),
        ({"init": picture, "mask": [mask] * 3}, "mask: 3 pictures for 2 prompts"),
        ({"init": [picture, small], "mask": mask}, "the mask is 30x20 px, the picture 8x8 px"),
        ({"init": picture, "mask": mask // 255}, "the mask is 1 of 255 where it is brightest"),
        ({"init": picture, "mask": mask * 0}, "the mask is 0 of 255 where it is brightest"),
        ({"init": picture, "strength": 2}, "strength=2: must be above 0, and at most 1"),
        ({"init": picture, "strength": 0.1}, "strength 0.1 of 3 steps takes none"),
        ({"init": picture, "strength": [1, 1]}, "strength=[1, 1]: 2 values for 3 stages"),
        ({"init": picture, "steering": [None] * 3}, "init and steering: both steer the stages"),
        ({"mask": mask}, "mask: goes with init"),
        ({"init": picture[:0]}, "init: must have pixels, got a picture of none"),
        ({"init": Image.new("RGB", (0, 9))}, "init: must have pixels"),
    ):
        with pytest.raises(ValueError) as e:
            model.draw(["a", "b"], **options)
        assert message in str(e.value)


def test_what_is_of_another_type_is_refused_with_the_way_out():
    """In a process of its own: here the tests' type checker would be the one that refuses."""
    code = """
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from cascade import testing

model = testing.cascade()
floats = np.ones((8, 8, 3))
for prompts, options, message in (
    ("a", {"lowres": floats}, "lowres: must be a PIL image or a uint8 array [h, w, 3] of 0..255, "
     "got float64 [8, 8, 3]: convert it with (255 * x).round().astype(np.uint8) if 1.0 is"),
    ("a", {"init": floats.astype(int)}, "init: .*int64.*: if its values are 0..255"),
    ("a", {"init": "photo.png"}, "got 'photo.png': open it with PIL.Image.open"),
    ("a", {"init": floats[..., 0].astype(np.uint8)}, "uint8 [8, 8]: make a PIL image of it with"),
    ("a", {"init": Image.fromarray(np.ones((8, 8), np.float32))}, "init: its pixels are"),
    ("a", {"init": floats.astype(np.uint8), "mask": floats[..., 0]}, "mask: must be a PIL image"),
    ("a", {"init": 3}, "got a value of type int"),
    ("a", {"init": np.zeros((2, 8, 8, 3), np.uint8)}, "give a list of its pictures, list(x)"),
    ("a", {"negative": [3]}, "negative: must be a text or a list of texts, got 3"),
    ("a", {"negative": 5}, "negative: must be a text or a list of texts, got 5"),
    ("a", {"progress": True}, "progress: must be a function, which is called with a Progress"),
    ("a", {"noise": "x"}, "noise: must be an array of floats, N(0, 1), got str"),
    ("a", {"noise": np.zeros((1, 8, 8, 3), np.uint8)}, "noise: .*uint8"),
    ("a", {"embeddings": floats}, "embeddings: must be a TextEmbedding, as model.encoder(prompts)"),
    (["a", 1], {}, "prompts: must be a text or a list of texts, got 1"),
    (None, {}, "prompts: must be a text or a list of texts, got None"),
):
    try:
        model(prompts, **options)
    except TypeError as e:
        assert all(part in str(e) for part in message.split(".*")), (message, str(e))
    else:
        raise AssertionError(message)
for seed in (1.5, "1", True, {1}):
    try:
        model("a", seed=seed)
    except ValueError as e:
        assert str(e) == f"seed={seed!r}: must be a whole number, 0 or more", e
    else:
        raise AssertionError(seed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Warnings.


def test_words_of_no_training_caption_are_warned_of_once_for_each_list():
    model = testing.cascade()
    model.known_words = frozenset({"red", "a"})
    with pytest.warns(UserWarning) as told:
        model.draw(["a red frog", "a frog", "a red", "toad"])
    assert [str(w.message) for w in told] == [
        f"not in the captions that testing was trained on: {word}" for word in ("frog", "toad")
    ]
    with pytest.warns(UserWarning, match="longer than 12 tokens"):
        model.draw("red " * 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.draw("a red")
        model.draw("frog", share=(1, 2))  # the first process has told it


# Pictures.


def test_pictures_are_pil_images_or_arrays_alike(model, picture):
    options = {"until": 16, "seed": 1, "strength": 0.7}
    asked = [model("a b", init=i, **options)[0] for i in (picture, Image.fromarray(picture))]
    np.testing.assert_array_equal(asked[0].image, asked[1].image)
    small = images.square(Image.fromarray(picture), 8)
    asked = [model("a b", lowres=i, until=16)[0].image for i in (small, Image.fromarray(small))]
    np.testing.assert_array_equal(*asked)
    assert not np.array_equal(asked[0], model("a b", lowres=255 - small, until=16)[0].image)


def test_init_is_what_the_options_of_the_command_line_do(model, picture):
    mask = np.zeros((20, 30), np.uint8)
    mask[:10] = 255
    stages = [stage.config for stage, _ in model.stages[:2]]
    for own, strength in ((None, None), (mask, None), (mask, 0.5), (None, [0.4, 0.5])):
        shares = [strength] * 2 if isinstance(strength, float) else strength
        steering = edits(stages, model.settings[:2], picture, mask=own, strength=shares)
        theirs = model("a b", until=16, steering=steering)[0]
        ours = model("a b", until=16, init=picture, mask=own, strength=strength)[0]
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert ours.metadata["edited"]["masked"] is (own is not None)
        default = [0.7 if own is None else 1.0, 0.8]
        assert list(ours.metadata["edited"]["strength"].values()) == (shares or default)
    assert "edited" not in theirs.metadata


def test_a_mask_may_be_true_white_or_white_on_a_transparent_layer(model, picture):
    true = np.zeros((20, 30), bool)
    true[2:9, 12:20] = True
    layer = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    ImageDraw.Draw(layer).rectangle((12, 2, 19, 8), fill="white")
    white = np.uint8(255) * true
    drawn = [
        model("a b", until=8, init=picture, mask=mask)[0].image
        for mask in (true, white, white[..., None].repeat(3, -1), Image.fromarray(white), layer)
    ]
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])
    kept = images.square(Image.fromarray(picture), 8, Image.Resampling.BICUBIC)
    assert 0.5 < (drawn[0] == kept).all(-1).mean() < 0.95


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_prompt_may_have_pictures_of_its_own(model, picture, batch_size):
    prompts, inits = ["a", "b"], [picture, 255 - picture]
    mask = np.zeros((20, 30), np.uint8)
    mask[:10] = 255
    options = {"until": 16, "batch_size": batch_size}
    many = model(prompts, init=inits, mask=[mask, 255 - mask], num=2, **options)
    for i, prompt in enumerate(prompts):
        own = {"init": inits[i], "mask": (mask, 255 - mask)[i]}
        for one, other in zip(model(prompt, **own, num=2, **options), many[2 * i :], strict=False):
            np.testing.assert_array_equal(one.image, other.image)
    small = [images.square(Image.fromarray(init), 8) for init in inits]
    many = model(prompts, lowres=small, **options)
    for prompt, low, drawn in zip(prompts, small, many, strict=True):
        alone = model(prompt, lowres=low, **options)[0]
        np.testing.assert_array_equal(alone.image, drawn.image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "HSV"])
def test_a_pil_image_is_read_as_its_file_would_be(tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4, 6, 4), np.uint8), "RGBA")
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (4, 6)).astype(np.uint16))
    elif mode != "RGBA":
        image = (image if mode == "LA" else image.convert("RGB")).convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image.convert("RGB") if mode == "HSV" else image).save(file)
    for ground in ("white", "black"):
        read = np.asarray(images.load_image(file, ground=ground))
        np.testing.assert_array_equal(images.rgb(image, "init", ground=ground), read)


def test_a_pil_image_is_turned_as_its_camera_was_held():
    image = Image.new("RGB", (6, 4))
    image.getexif()[0x0112] = 6
    assert images.rgb(image, "init").shape == (6, 4, 3)


# Frames.


@pytest.mark.parametrize("batch_size", [1, 2])
def test_frames_show_how_a_picture_came_about(model, batch_size):
    plain = model("a b", until=16, steps=[6, 3], num=2)
    drawn = model("a b", until=16, steps=[6, 3], num=2, frames=4, batch_size=batch_size)
    for picture, without in zip(drawn, plain, strict=True):
        assert {side: len(path) for side, path in picture.frames.items()} == {8: 4, 16: 3}
        assert without.frames == {}
        for side, path in picture.frames.items():
            np.testing.assert_array_equal(path[-1], picture.images[side])
            # Other batch sizes and other outputs are other programs: a last bit may differ.
            assert np.abs(path[-1].astype(int) - without.images[side]).max() <= 1
            assert not np.array_equal(path[0], path[-1])
    assert not np.array_equal(drawn[0].frames[8], drawn[1].frames[8])


def test_frames_of_a_stage_in_latents_are_pictures(model):
    base, _ = model.stages[0]
    config = base.config
    autoencoder = AutoencoderConfig(widths=(8, 8), blocks=1, groups=4, scaling=0.2)
    latent = Stage(
        dataclasses.replace(
            config,
            space=Latents(resolution=16, autoencoder=autoencoder),
            network=dataclasses.replace(config.network, in_channels=4, out_channels=4),
            sampling=dataclasses.replace(config.sampling, threshold=Threshold(kind="none")),
        )
    )
    drawn = Cascade([(latent, testing.lively(latent))], model.encoder)("a b", frames=2)[0]
    assert drawn.frames[16].shape == (2, 16, 16, 3)
    assert np.abs(drawn.frames[16][-1].astype(int) - drawn.image).max() <= 1
    assert not np.array_equal(drawn.frames[16][0], drawn.image)


def test_frames_of_pictures_that_devices_share_are_the_same(model):
    alone, shared = (model("a b", until=16, frames=2, split_rows=n)[0] for n in (1, 4))
    for side, path in alone.frames.items():
        assert np.abs(shared.frames[side].astype(int) - path).max() <= 1


# What is read of it.


def test_draw_and_call_have_one_signature_with_types_and_one_help():
    draw, call = (inspect.signature(getattr(Cascade, name)) for name in ("draw", "__call__"))
    assert call.parameters == draw.parameters
    for name, parameter in draw.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty
    assert call.return_annotation == "list[Picture]"
    for name in draw.parameters:
        assert name == "self" or f"{name}: " in (Cascade.draw.__doc__ or ""), name
    text = pydoc.render_doc(Cascade, renderer=pydoc.plaintext)
    assert "__call__(self, prompts: " in text and text.count("Draw pictures: `draw` gives") == 2


def test_a_model_says_its_name_and_stages(model):
    assert repr(model) == "Cascade('testing': base8 8 px, sr16 16 px, sr32 32 px)"


def test_the_package_says_its_version_and_names_without_jax():
    code = """
import sys
import cascade
assert cascade.__version__.count(".") == 2
assert {"Cascade", "Picture", "__version__"} <= set(dir(cascade)), dir(cascade)
assert not {"Any", "TYPE_CHECKING"} & set(dir(cascade))
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert package.Picture is not None and package.Cascade is Cascade
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


# What comes in place of prompts and seeds.


def test_negatives_may_be_one_for_each_prompt(model):
    prompts, away = ["red", "blue", "grey"], ["green", "star", "ring"]
    together = model(prompts, negative=away, until=8, batch_size=2)
    for prompt, text, picture in zip(prompts, away, together, strict=True):
        (alone,) = model(prompt, negative=text, until=8, batch_size=2)
        np.testing.assert_array_equal(picture.image, alone.image)
        assert picture.metadata["negative"] == text
    (plain,) = model("red", until=8, batch_size=2)
    assert not np.array_equal(plain.image, together[0].image)
    with pytest.raises(UserError, match="negative: 2 texts for 3 prompts; give one for each"):
        model(prompts, negative=away[:2], until=8)
    with pytest.raises(UserError, match="negative 2 is empty"):
        model(prompts[:2], negative=["red", " "], until=8)


def test_embeddings_stand_for_prompts(model):
    prompts = ["red", "blue"]
    rows = model.encoder(prompts)
    named = model(["one", "two"], embeddings=rows, until=16, num=2, batch_size=3)
    for ours, theirs in zip(named, model(prompts, until=16, num=2, batch_size=3), strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert ours.prompt in ("one", "two") and ours.metadata["from_embeddings"]
    with pytest.raises(UserError, match="embeddings: 2 rows for 1 prompt; give one for each"):
        model("one", embeddings=rows, until=8)
    wide = dataclasses.replace(rows, values=jnp.tile(rows.values, (1, 1, 2)))
    with pytest.raises(UserError, match="its embeddings are"):
        model(prompts, embeddings=wide, until=8)


def test_noise_stands_for_that_of_the_seeds(model):
    key = jax.vmap(jax.random.key)(np.array([3, 4], np.uint32))
    key = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, 8), 3)[0])(key)
    noise = np.asarray(samplers.initial_noise(key, (8, 8, 3)))
    options = {"until": 16, "sampler": "ddim", "num": 2, "batch_size": 3}
    theirs, ours = (model("red", seed=3, **options), model("red", seed=3, noise=noise, **options))
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(a.images[8], b.images[8])
        np.testing.assert_array_equal(a.images[16], b.images[16])
    turned = model("red", seed=3, noise=noise[::-1].copy(), **options)
    np.testing.assert_array_equal(turned[0].images[8], theirs[1].images[8])
    with pytest.raises(UserError, match=r"begins 1 picture from noise of shape \[1, 8, 8, 3\]"):
        model("red", noise=noise)
    with pytest.raises(UserError, match="noise: must be finite"):
        model("red", noise=noise[:1] * np.float32(np.nan))


# Progress.


def test_progress_is_told_before_the_first_step_and_after_every_one(model):
    told = []
    drawn = model("red", num=3, until=16, steps=[3, 2], batch_size=2, progress=told.append)
    found = [(p.stage, p.resolution, p.step, p.steps, p.pictures) for p in told]
    stages = (("base8", 8, 3), ("sr16", 16, 2))
    assert found == [
        (name, side, step, steps, pictures)
        for pictures in (2, 1)
        for name, side, steps in stages
        for step in range(steps + 1)
    ]
    assert told[0].images is None and told[1].images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(told[3].images[1], drawn[1].images[8])
    np.testing.assert_array_equal(told[-1].images[0], drawn[2].images[16])
    assert not np.array_equal(told[1].images, told[3].images)


def test_what_progress_raises_ends_the_drawing(model):
    def stop(progress):
        if progress.step == 2:
            raise InterruptedError("stop")

    with pytest.raises(InterruptedError):
        model("red", until=8, steps=4, progress=stop)


def test_a_watched_drawing_is_of_the_same_program(model, caplog):
    options = {"until": 16, "steps": [5, 7], "batch_size": 3}

    def compiled(**more):
        caplog.clear()
        with jax.log_compiles():
            drawn = model("red", **options, **more)[0].image
        begun = [m for m in caplog.messages if m.startswith("Compiling jit(_carried)")]
        return len(begun), drawn

    (first, plain), (again, watched) = compiled(), compiled(progress=lambda _: None)
    assert (first, again) == (2, 0)  # a program for each stage
    np.testing.assert_array_equal(plain, watched)
    assert compiled(split_rows=2, progress=lambda _: None)[0] == 1  # what devices share
    assert compiled(split_rows=2)[0] == 0


def test_steps_may_be_entries_of_a_table(model):
    told = settings(model, steps=[[999, 500, 10], 4])
    assert told["base8"]["steps"] == 3 and told["base8"]["grid"]["chosen"] == [999, 500, 10]
    assert told["sr16"]["steps"] == 4
    assert told == settings(model, steps="999/500/10,4")
    with pytest.raises(UserError, match="steps='10/999': the entries must fall, within 999 to 0"):
        settings(model, steps=[[10, 999], 4])
    with pytest.raises(UserError, match="a list of table entries is whole numbers"):
        settings(model, steps="999/x,4")


# Pictures that are not square.


def test_pictures_have_the_size_that_was_asked_for_at_every_stage(model):
    (wide,) = model("red", size=(8, 16), frames=2, batch_size=2)
    shapes = {side: picture.shape for side, picture in wide.images.items()}
    assert shapes == {8: (8, 16, 3), 16: (16, 32, 3), 32: (32, 64, 3)}
    assert wide.frames[16].shape == (2, 16, 32, 3) and wide.metadata["size"] == [8, 16]
    (square,) = model("red", size=(8, 8), batch_size=2)
    np.testing.assert_array_equal(square.image, model("red", batch_size=2)[0].image)
    assert wide.strip().size == (8 * 64 + 7 * 2, 3 * 32 + 2 * 2)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"size": (8, 9)}, "size='8x9': stage base8 of 8x9 px: image sides must be multiples of 2"),
        ({"size": (0, 8)}, "size='0x8': must be a height and a width"),
        ({"size": (8, 2**20)}, "stage sr32 would draw more than"),
        ({"size": (8, 16), "init": np.zeros((9, 9, 3), np.uint8)}, "goes with prompts alone"),
        ({"size": (8, 16), "lowres": np.zeros((8, 8, 3), np.uint8)}, "goes with prompts alone"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_rule(options, message):
    with pytest.raises(OptionError, match=message):
        testing.cascade()("red", **options)  # its first stage halves the sides once


@pytest.mark.parametrize("given", [64, "64x96"])
def test_a_size_of_another_type_is_told_as_any_mistake(given):
    sizes = inspect.unwrap(inputs.sizes)  # without the types that tests check
    with pytest.raises(OptionError, match=r"in pixels, such as \(64, 96\)") as e:
        sizes(given, [], begun=False)
    assert repr(given) in str(e.value)
