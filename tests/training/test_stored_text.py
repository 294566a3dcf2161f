"""Training from a store of embeddings is training on the text encoder, without it."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import processes
import pytest

from cascade import images, testing
from cascade.data import FolderData
from cascade.devices import distributed, sharding
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData
from cascade.scenes.training import ScenesTraining
from cascade.stage import Pixels, Text
from cascade.text import T5Encoder, t5
from cascade.training import log as training_log
from cascade.training import preview, text_input
from cascade.training.embed import EmbedOptions, embed
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import RunningStage, StageTraining

T5 = str(pathlib.Path(__file__).parents[1] / "fixtures" / "t5")
DATA = ScenesData(split="train", size=60)
STAGE = testing.smallest_stage(text_width=16)
CONFIG = StageTraining(
    stage=STAGE,
    data=DATA,
    text_encoder=T5,
    text_tokens=48,
    images=8 * 12,
    batch_size=8,
    optimizer=Optimizer(learning_rate=1e-2),
    log_every_images=8,
    save_every_images=32,
    preview_every_images=0,
)
PROMPTS = ["a red circle", "a star that no caption has"]


def store_of(folder, dtype="float32", data=DATA, **changes):
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = {"text_encoder": T5, "text_tokens": 48, "shards": 2, "prompts": prompts}
    options |= {"dtype": dtype, "count": 60}
    embed(EmbedOptions(source="scenes", out=str(folder), **options | changes), data)
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """dtype -> a store of all captions of DATA, and of PROMPTS."""
    folder = tmp_path_factory.mktemp("stores")
    return {dtype: store_of(folder / dtype, dtype) for dtype in ("float32", "bfloat16", "int8")}


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def trained(workdir, config=CONFIG, **changes):
    assert fit(dataclasses.replace(config, **changes), workdir)
    return losses(workdir)


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("online") / "run")


@pytest.fixture
def no_encoder(monkeypatch):
    """No text encoder can be loaded, nor a text tokenized."""

    def refuse(*args, **options):
        raise AssertionError("a text encoder is loaded")

    monkeypatch.setattr(T5Encoder, "load", refuse)
    monkeypatch.setattr(t5, "Tokenizer", refuse)


def batches_of(count=2, job=CONFIG, **changes):
    """The first batches, as the loss takes them."""
    job = dataclasses.replace(job, **changes)
    running = job.open(sharding.make_mesh(job.mesh), pathlib.Path("none"))
    found = [running.prepare(next(running.batches), step) for step in range(count)]
    close = getattr(running._read, "close", None)
    if close is not None:
        close()
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_from_a_float32_store_is_the_one_online(stores, monkeypatch, workers):
    expected = batches_of()
    monkeypatch.setattr(T5Encoder, "load", None)
    found = batches_of(embeddings=stores["float32"], workers=workers)
    for a, b in zip(expected, found, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
            k: (v.shape, v.dtype) for k, v in b.items()
        }
        mask = a["text_mask"]
        np.testing.assert_array_equal(b["image"], a["image"])
        np.testing.assert_array_equal(b["text_mask"], mask)
        np.testing.assert_allclose(b["text"][mask], a["text"][mask], atol=2e-5)
        assert not b["text"][~mask].any()


def test_a_run_from_a_float32_store_has_the_losses_of_one_online(
    stores, online, tmp_path, no_encoder
):
    from_store = trained(tmp_path / "run", embeddings=stores["float32"])
    assert len(online) == 12
    np.testing.assert_allclose(from_store, online, rtol=1e-5)


@pytest.mark.parametrize("dtype,apart", [("bfloat16", 0.02), ("int8", 0.05)])
def test_a_run_from_a_rounded_store_stays_close(stores, online, tmp_path, no_encoder, dtype, apart):
    np.testing.assert_allclose(
        trained(tmp_path / "run", embeddings=stores[dtype]), online, rtol=apart
    )


def test_text_matters_to_these_losses(stores, online, tmp_path, monkeypatch):
    """Or the tests above would say nothing."""
    restored = text_input.restored
    monkeypatch.setattr(text_input, "restored", lambda v, s=None: restored(v, s)[::-1])
    other = trained(tmp_path / "run", embeddings=stores["float32"])
    assert np.abs(np.array(other) / online - 1).max() > 1e-4


def test_scenes_that_the_device_draws_take_text_from_a_store_too(stores, tmp_path):
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    stage = dataclasses.replace(STAGE, space=Pixels(resolution=32))
    job = ScenesTraining(**fields | {"stage": stage, "images": 16})
    expected = batches_of(job=job)
    for missing in ("refuse", "encode"):
        found = batches_of(job=job, embeddings=stores["float32"], embeddings_missing=missing)
        for a, b in zip(expected, found, strict=True):
            mask = a["text_mask"]
            np.testing.assert_array_equal(b["image"], a["image"])
            np.testing.assert_allclose(b["text"][mask], a["text"][mask], atol=2e-5)


# No text


def test_the_prompt_of_no_text_comes_from_the_store_for_the_same_examples(stores, tmp_path):
    """DeepFloyd IF's is empty; examples are drawn as online."""
    stage = dataclasses.replace(
        STAGE, conditions=(Text(width=16, head_width=8, dropout=0.5, null_prompt=""),)
    )
    expected = batches_of(3, stage=stage)
    found = batches_of(3, stage=stage, embeddings=stores["float32"])
    lost = np.stack([batch["text_mask"].sum(1) == 1 for batch in expected])
    assert 0.2 < lost.mean() < 0.8 and (lost[0] != lost[1]).any()
    (empty,) = T5Encoder.load(T5, 48)([""]).values[:, 0]
    for a, b in zip(expected, found, strict=True):
        mask = a["text_mask"]
        np.testing.assert_array_equal(b["text_mask"], mask)
        np.testing.assert_allclose(b["text"][mask], a["text"][mask], atol=2e-5)
        for row in b["text"][mask.sum(1) == 1]:
            np.testing.assert_allclose(row[0], empty, atol=2e-5)
    other = dataclasses.replace(stage.conditions[0], null_prompt="nothing at all")
    with pytest.raises(UserError, match="have no caption 'nothing at all'"):
        batches_of(stage=dataclasses.replace(stage, conditions=(other,)), embeddings=stores["int8"])


def test_previews_draw_the_prompts_that_the_store_has(stores, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(preview, "draw", lambda *args: drawn.append(args[3:]))
    prompts = (PROMPTS[0], "a prompt of another day", PROMPTS[1])
    changes = {"preview_prompts": prompts, "preview_every_images": 96, "images": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5Encoder, "load", None)
        trained(tmp_path / "run", embeddings=stores["float32"], **changes)
    ((shown, given),) = drawn
    assert shown == PROMPTS
    told = "warning: previews leave out 1 prompts that .* lacks, such as 'a prompt of another day'"
    assert [line for line in capsys.readouterr().err.splitlines() if told.split(".*")[0] in line]
    expected = T5Encoder.load(T5, 48)(PROMPTS)
    mask = np.asarray(expected.mask)
    np.testing.assert_array_equal(given(PROMPTS).mask, mask)
    np.testing.assert_allclose(given(PROMPTS).values[mask], expected.values[mask], atol=2e-5)


def test_a_preview_is_drawn_without_an_encoder(stores, tmp_path, no_encoder):
    changes = {"preview_prompts": tuple(PROMPTS), "preview_every_images": 8, "images": 8}
    trained(tmp_path / "run", embeddings=stores["int8"], **changes)
    (file,) = (tmp_path / "run" / "previews").iterdir()
    assert images.load_image(file).width > 8


# Which store


def encoder_like(folder):
    """The encoder with one weight changed."""
    encoder = T5Encoder.load(T5)
    encoder.params["final_norm"]["scale"] = encoder.params["final_norm"]["scale"].at[0].add(0.5)
    encoder.save(folder)
    return str(folder)


def test_a_store_of_another_encoder_is_refused_and_both_are_named(stores, tmp_path):
    other = encoder_like(tmp_path / "other")
    made = t5.digest(pathlib.Path(T5))[:12]
    with pytest.raises(UserError) as e:
        fit(
            dataclasses.replace(CONFIG, text_encoder=other, embeddings=stores["int8"]),
            tmp_path / "run",
        )
    for said in (T5, other, f"SHA-256 {made}", t5.digest(pathlib.Path(other))[:12]):
        assert said in str(e.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_known_by_its_weights_wherever_it_lies(stores, tmp_path):
    moved = str(shutil.copytree(T5, tmp_path / "moved"))
    batches_of(1, text_encoder=moved, embeddings=stores["float32"])


def test_where_the_encoder_is_not_here_its_name_decides(tmp_path):
    """As on machines that only train."""
    folder = shutil.copytree(T5, tmp_path / "encoder")
    store = store_of(tmp_path / "store", "int8", text_encoder=str(folder))
    shutil.rmtree(folder)
    batches_of(1, text_encoder=str(folder), embeddings=store)
    with pytest.raises(UserError, match="text_encoder is google/t5 .which is not on this machine"):
        batches_of(1, text_encoder="google/t5", embeddings=store)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"captions": "lower"}, "were made with captions=verbatim, and the config has"),
        ({"text_int8": True}, "were made with text_int8=False"),
        ({"text_tokens": 3}, "texts cut to 48 tokens, the longest of .*; set text_tokens to 48"),
        (
            {"stage": testing.smallest_stage(text_width=8)},
            "embeddings are 16 wide, and stage base8",
        ),
        ({"embeddings": "none"}, "embeddings none: no such folder; `cascade data embed`"),
        ({"data": dataclasses.replace(DATA, seed=5)}, "have no caption 'a.*'; embed all captions"),
    ],
)
def test_what_would_not_be_as_online_is_refused_before_training(stores, tmp_path, changes, says):
    config = dataclasses.replace(CONFIG, **{"embeddings": stores["int8"]} | changes)
    with pytest.raises(UserError, match=says):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caption_that_only_the_run_meets_is_named_too(stores, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(text_input, "CHECKED", 1)
    changes = {"data": dataclasses.replace(DATA, size=5_000), "workers": workers}
    with pytest.raises(UserError, match="have no caption '.*'; embed all captions"):
        trained(tmp_path / "run", embeddings=stores["int8"], **changes)


def test_captions_that_are_missing_can_be_encoded(tmp_path):
    half = store_of(tmp_path / "half", "float32", count=30)
    expected = batches_of()
    found = batches_of(embeddings=half, embeddings_missing="encode")
    for a, b in zip(expected, found, strict=True):
        mask = a["text_mask"]
        np.testing.assert_array_equal(b["text_mask"], mask)
        np.testing.assert_allclose(b["text"][mask], a["text"][mask], atol=2e-5)
        assert b.keys() == a.keys()
    with pytest.raises(UserError, match="were made by the text encoder"):
        other = encoder_like(tmp_path / "other")
        batches_of(1, embeddings=half, embeddings_missing="encode", text_encoder=other)


def test_a_run_goes_on_with_any_source_of_the_same_text_and_tells_of_another(
    stores, online, tmp_path, capsys
):
    config = dataclasses.replace(CONFIG, embeddings=stores["float32"])
    moved = str(shutil.copytree(stores["float32"], tmp_path / "moved"))
    fit(CONFIG, tmp_path / "run", until=32)
    fit(config, tmp_path / "run", until=56)
    assert "another store" not in capsys.readouterr().err
    fit(dataclasses.replace(config, embeddings=moved), tmp_path / "run", until=72)
    said = capsys.readouterr().err
    assert f"embeddings: {stores['float32']} before, {moved} now" in said
    assert "another store" not in said
    fit(dataclasses.replace(config, embeddings=stores["bfloat16"]), tmp_path / "run", until=80)
    assert "the run goes on with another store (SHA-256 " in capsys.readouterr().err
    fit(CONFIG, tmp_path / "run")
    found = losses(tmp_path / "run")
    np.testing.assert_allclose(found[:9], online[:9], rtol=1e-5)
    np.testing.assert_allclose(found, online, rtol=0.02)


def test_a_stage_that_reads_no_text_leaves_a_store_alone():
    (batch,) = batches_of(1, stage=testing.smallest_stage(text_width=0), embeddings="none")
    assert batch.keys() == {"image"}


def test_pictures_that_cannot_be_read_take_no_text_with_them(tmp_path):
    """Another example stands in, with its own caption."""
    source = tmp_path / "d"
    source.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        images.save_png(source / f"{i}.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"number {i}"}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    (source / "3.png").write_bytes(b"no picture")
    data = FolderData(path=str(source))
    store = store_of(tmp_path / "s", "float32", data, count=None)
    changes = {"data": data, "batch_size": 8}
    expected = batches_of(3, **changes)
    found = batches_of(3, **changes, embeddings=store)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(b["image"], a["image"])
        np.testing.assert_array_equal(b["text_mask"], a["text_mask"])


def as_one_of_several(workdir, store):
    training_log._plot_loss = lambda *_: None
    with distributed.processes(), contextlib.redirect_stderr(io.StringIO()):
        fit(dataclasses.replace(CONFIG, embeddings=store, images=32), workdir)


def test_several_processes_train_from_one_store(stores, online, tmp_path):
    group = processes.start_group(2, as_one_of_several, tmp_path / "run", stores["float32"])
    assert processes.codes(group) == [0, 0]
    np.testing.assert_allclose(losses(tmp_path / "run"), online[:4], rtol=1e-4)


def test_nothing_of_an_encoder_is_held(stores):
    running = dataclasses.replace(CONFIG, embeddings=stores["int8"]).open(
        sharding.make_mesh(CONFIG.mesh), pathlib.Path("none")
    )
    assert isinstance(running, RunningStage) and isinstance(running._text, text_input.Stored)
    held = [value for value in vars(running._text).values() if isinstance(value, T5Encoder)]
    assert not held and running._text.reader.tokenizer is None
