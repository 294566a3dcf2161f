"""Training that begins from DeepFloyd IF's weights: all of them, or LoRA's adapters."""

import dataclasses
import filecmp
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pipelines import IF8, IF16, T5, write_model, write_pipeline

from cascade import cli, testing
from cascade.commands.export import export
from cascade.config import load_with, read_json, to_json
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.stage import Stage
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.paths import write_json
from cascade.storage.weights import load_safetensors
from cascade.text import T5Encoder
from cascade.text.t5 import SHIPPED
from cascade.training import lora
from cascade.training.stage_training import StageTraining
from cascade.training.step import begin
from cascade.training.text_input import make_embedder
from cascade.training.trainable import LoRA, Weights

CONFIG = str(Path(__file__).parents[2] / "configs" / "finetune.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and eight pictures to train it on."""
    folder = tmp_path_factory.mktemp("finetuning")
    write_model(folder / "if", IF8, IF16)
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (2, 2, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"Picture number {i}")
    return folder


def weights(file, stage=IF8):
    return load_safetensors(file / stage.name / "model.safetensors", Stage(stage).abstract())


@pytest.fixture(scope="module")
def loss_of(folder):
    """weights -> (their loss, its gradient), at the same pictures, times and noises for all."""
    files = [folder / "pictures" / f"{i % 8}.png" for i in range(16)]
    text = T5Encoder.load(T5, 77)([f"picture number {i % 8}" for i in range(16)])
    image = np.stack([np.asarray(Image.open(file)) for file in files])
    batch = {"image": jnp.asarray(image), "text": text.values, "text_mask": text.mask}

    def loss(params):
        return Stage(IF8).loss(params, batch, jax.random.key(7))[0]

    return jax.jit(jax.value_and_grad(loss))


def test_all_weights_learn_from_where_they_were(folder, loss_of):
    config = StageTraining(
        stage=IF8, data=ScenesData(), images=64, batch_size=8, init=str(folder / "if")
    )
    params = config.start()
    jax.tree.map(np.testing.assert_array_equal, params, weights(folder / "if"))
    state = begin(config, config.transformation(), params)
    assert "frozen" not in state and state["train"]["params"] is params
    first, gradient = loss_of(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for _ in range(10):
        gradient = loss_of(params)[1]
        params = jax.tree.map(lambda p, g: np.asarray(p) - 0.01 * np.asarray(g), params, gradient)
    assert loss_of(params)[0] < 0.9 * first


def test_lora_trains_beside_the_weights_and_merges_into_them(folder, loss_of, tmp_path, capsys):
    run, out, base = tmp_path / "run", tmp_path / "out", folder / "if"
    words = [*("train", CONFIG, "--init", base, "--workdir", run, "--lora-rank", 2)]
    words += ["--data.path", folder / "pictures", "--images", 160, "--batch-size", 8]
    words += ["--stage.network.compute-dtype", "float32", "--stage.network.remat", "False"]
    words += ["--optimizer.learning-rate", 0.1, "--preview-every-images", 0]
    words += ["--optimizer.warmup-images", 8]
    words = list(map(str, words))
    cli.main(words)
    cli.main(words)  # resumed at its end: the frozen weights come from init again
    checkpoints = Checkpoints(run)
    _, adapters, saved = checkpoints.restore_ema()
    checkpoints.close()
    assert saved["captions"] == "clean" and saved["text_tokens"] == 77
    cli.main(["export", str(run), str(out)])
    before, after = weights(base), weights(out)
    changed = set()

    def compare(path, old, new):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if np.array_equal(old, new):
            return
        changed.add(name)
        part = adapters
        for key in name.split("/"):
            part = part[key]
        assert part["a"].shape[1] == part["b"].shape[0] == 2
        np.testing.assert_allclose(new, old + part["a"] @ part["b"], atol=1e-6)

    jax.tree.map_with_path(compare, before, after)
    attention = "network/mid_block/attentions/0"
    projections = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out/0")
    assert changed == {f"{attention}/{name}/kernel" for name in projections}
    assert loss_of(after)[0] < 0.97 * loss_of(before)[0]
    cascade = Cascade.load(out)
    assert (cascade.encoder.max_tokens, cascade.encoder.tokenizer.captions) == (77, "clean")
    assert_beside(IF16, base, run, tmp_path / "whole")
    # Adapters of other weights would be nonsense.
    shutil.copytree(base, other := tmp_path / "other")
    capsys.readouterr()
    for changes, message in (
        (["--init", str(other)], f"another config (init: {base} before, {other} now)"),
        (["--lora-rank", "3"], "another config (trainable.rank: 2 before, 3 now)"),
        (["--lora-rank", "0"], "another config (trainable.rank: 2 before, None now)"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words[:2], *changes, *(w for w in _without(words[2:], changes[0]))])
        assert message in capsys.readouterr().err


def assert_beside(rest, base, run, out):
    """What the run trained is exported with the model's other stage as it was, and is a cascade."""
    cli.main(["export", str(run), str(out), "--rest", str(base)])
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(out / rest.name / name, base / rest.name / name, shallow=False)
    sides = [stage.config.resolution for stage, _ in Cascade.load(out).stages]
    assert sides == [8, 16]
    assert read_json(out / "config.json")["trained"].keys() == {"if8", "if16"} - {rest.name}


def _without(words, flag):
    return [w for i, w in enumerate(words) if w != flag and (i == 0 or words[i - 1] != flag)]


def test_the_second_stage_trains_beside_its_weights_and_goes_beside_the_first(folder, tmp_path):
    run, base = tmp_path / "run", folder / "if"
    words = [*("train", CONFIG, "--init", base, "--stage", "if16", "--workdir", run)]
    words += ["--lora-rank", 2]
    words += ["--data.path", folder / "pictures", "--images", 320, "--batch-size", 16]
    words += ["--stage.network.compute-dtype", "float32", "--stage.network.remat", "False"]
    words += ["--optimizer.learning-rate", 0.1, "--preview-every-images", 0]
    words += ["--optimizer.warmup-images", 16]
    cli.main(list(map(str, words)))
    assert_beside(IF8, base, run, tmp_path / "whole")
    text = T5Encoder.load(T5, 77)([f"picture number {i % 8}" for i in range(16)])
    files = [Image.open(folder / "pictures" / f"{i % 8}.png") for i in range(16)]
    pictures, low = (
        jnp.asarray(np.stack([np.asarray(file.resize((side, side), 0)) for file in files]))
        for side in (16, 8)
    )
    batch = {"image": pictures, "lowres": low, "text": text.values, "text_mask": text.mask}
    loss = jax.jit(lambda params: Stage(IF16).loss(params, batch, jax.random.key(7))[0])
    before, after = (weights(model, IF16) for model in (base, tmp_path / "whole"))
    assert loss(after) < 0.97 * loss(before)


def test_stages_that_do_not_fit_beside_a_run_are_one_line(folder, tmp_path):
    config = StageTraining(
        stage=IF8,
        data=ScenesData(),
        images=8,
        batch_size=8,
        text_encoder=str(T5),
        text_tokens=77,
        captions="clean",
    )
    params = weights(folder / "if")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, train={"step": np.ones(())}, ema=params, config=to_json(config), data={})
    checkpoints.close()
    base = tmp_path / "if"
    shutil.copytree(folder / "if", base)
    about = read_json(base / "config.json")
    for changes, message in (
        ({"stages": ["if8"]}, "has no stage but those trained, if8"),
        ({"max_tokens": 12}, "read captions as so many tokens: 12, and the runs' 77"),
        ({"captions": "verbatim"}, "read captions prepared so: verbatim, and the runs' clean"),
        ({"text_encoder": "scenes"}, "its text encoder scenes is not the runs'"),
    ):
        write_json(base / "config.json", about | changes)
        with pytest.raises(UserError, match=message):
            export([tmp_path / "run"], tmp_path / "out", rest=str(base))
    write_json(base / "config.json", about)
    report = export([tmp_path / "run"], tmp_path / "out", rest=str(base))
    assert report["stages"] == ["if8", "if16"]


def made_run(workdir, name="base8", **changes):
    """A run of one checkpoint, which nothing has trained."""
    stage = dataclasses.replace(testing.smallest_stage(), name=name)
    config = StageTraining(stage=stage, data=ScenesData(), images=8, batch_size=8, **changes)
    weights = jax.tree.map(lambda x: jnp.zeros(x.shape), Stage(stage).abstract())
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, train=weights, ema=weights, config=to_json(config), data={})
    checkpoints.close()
    return workdir


@pytest.mark.parametrize("name", ["enc", "../enc", "/no/such/enc"])
def test_a_text_encoder_that_is_not_there_cannot_be_exported(tmp_path, monkeypatch, name):
    run = made_run(tmp_path / "run", text_encoder=name)
    with pytest.raises(UserError, match=f"text_encoder='{name}' is no folder here; export from"):
        export([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_encoder_of_the_hub_is_named_and_a_folder_copied(tmp_path, monkeypatch):
    report = export([made_run(tmp_path / "hub", text_encoder="google/t5")], tmp_path / "named")
    assert report["text_encoder"] == "google/t5"
    assert not (tmp_path / "named" / "text_encoder").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enc").symlink_to(SHIPPED["scenes"])
    report = export([made_run(tmp_path / "here", text_encoder="enc")], tmp_path / "copied")
    assert "text_encoder" not in report
    assert (tmp_path / "copied" / "text_encoder" / "config.json").is_file()


def test_two_stages_that_draw_from_text_alone_are_no_cascade(tmp_path):
    runs = [made_run(tmp_path / name, name) for name in ("one", "two")]
    with pytest.raises(UserError, match="stages one and two make no cascade: two draws from text"):
        export(runs, tmp_path / "out")


def test_adapters_change_nothing_to_begin_with_in_any_network():
    stage = Stage(testing.base_stage())
    params = testing.lively(stage)
    made = lora.adapters(params, 3, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, lora.merged(params, made), params)
    kernels = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(made)]
    assert kernels and all("attention" in k and k.endswith(("['a']", "['b']")) for k in kernels)
    moved = jax.tree.map(jnp.ones_like, made)
    added = jax.tree.map(jnp.subtract, lora.merged(params, moved), params)
    assert {tuple(np.unique(x.round(4))) for x in jax.tree.leaves(added)} == {(0.0,), (3.0,)}
    with pytest.raises(ValueError, match="no attention"):
        lora.adapters({"conv": {"kernel": jnp.ones((3, 3, 2, 2))}}, 3, jax.random.key(0))


def test_text_is_dropped_to_the_embedding_of_no_text():
    encoder = T5Encoder.load(T5, 12)
    config = StageTraining(stage=IF8, data=ScenesData(), images=64, batch_size=64)
    tokens = encoder.tokenize([f"a red circle number {i}" for i in range(64)])
    embed = jax.jit(make_embedder(config, encoder))
    own, empty = encoder.embed(tokens), encoder([""])
    dropped = []
    for step in (0, 0, 1):
        text = embed(encoder.params, tokens.ids, tokens.mask, step)
        lost = np.isclose(text["text"], empty.values, atol=1e-5).all((1, 2))
        np.testing.assert_allclose(text["text"][~lost], own.values[~lost], atol=1e-5)
        np.testing.assert_array_equal(text["text_mask"].sum(1) == 1, lost)
        dropped.append(lost.tolist())
    assert dropped[0] == dropped[1] != dropped[2] and 1 <= sum(dropped[0]) <= 16


def test_a_start_is_read_in_either_layout(folder, tmp_path):
    def started(model, stage, **options):
        config = StageTraining(stage=stage, data=ScenesData(), images=8, batch_size=8, init=model)
        return dataclasses.replace(config, **options).start()

    published = open_model(pipeline := str(write_pipeline(tmp_path, 1)))
    (config,) = published.stages
    assert config.loss.space == "eps" and published.text_encoder == pipeline
    assert {leaf.dtype for leaf in jax.tree.leaves(started(pipeline, config))} == {
        jnp.dtype("float32")
    }
    half = config.computing_in("bfloat16")
    params = started(pipeline, half, trainable=LoRA(rank=2))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    converted = str(folder / "if")
    assert open_model(converted).stages == [IF8, IF16]
    params = started(converted, IF8)
    jax.tree.map(np.testing.assert_array_equal, params, weights(folder / "if"))
    with pytest.raises(UserError, match="the network of its if8 is not that of the config"):
        started(converted, config)
    with pytest.raises(UserError, match="has no stage if32, only if8, if16"):
        started(converted, dataclasses.replace(IF8, name="if32"))


def test_a_start_that_is_not_there_is_one_line(folder, capsys):
    for words, told in (
        (["--init", "no/such"], "model no/such: no such folder"),
        (["--stage", "sr"], "stage=sr: scenes has no such stage, only base64, sr256, sr1024"),
        (["--data", "folder:nowhere"], "data folder nowhere: no such folder"),
    ):
        with pytest.raises(SystemExit) as e:
            cli.main(["train", CONFIG, "--workdir", str(folder / "refused"), *words])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith("error: ") and told in err
        assert not (folder / "refused").exists()


def test_any_stage_of_any_model_is_taken_as_its_model_reads_texts(folder):
    """A crop where a whole picture would be large, and the types of what is large."""
    base, _ = load_with(CONFIG, [])
    assert (base.init, base.stage.name, base.crop) == ("scenes", "base64", None)
    assert base.text_encoder.endswith("scenes/text_encoder") and base.text_tokens == 128
    large, _ = load_with(CONFIG, ["--stage", "sr1024"])
    assert (large.stage.name, large.crop, large.text_int8) == ("sr1024", 256, False)
    public, _ = load_with(CONFIG, ["--init", str(folder / "if")])
    assert (public.stage, public.text_tokens, public.captions) == (IF8, 77, "clean")
    assert base.trainable == Weights()  # what is small
    second, _ = load_with(CONFIG, ["--stage", "sr256"])
    assert (second.stage.name, second.crop) == ("sr256", None)
    sizes = [(job.batch_size, job.images, job.optimizer.learning_rate) for job in (base, second)]
    assert sizes == [(16, 3200, 1e-3), (8, 3200, 1e-3)]


def test_what_is_large_learns_adapters_beside_weights_of_two_bytes(monkeypatch):
    shapes = {"kernel": jax.ShapeDtypeStruct((10_000, 20_000), jnp.float32)}
    monkeypatch.setattr(Stage, "abstract", lambda self: shapes)
    large, _ = load_with(CONFIG, [])
    assert large.trainable == LoRA(rank=16) and large.text_int8
    assert (large.images, large.optimizer.learning_rate) == (16_000, 1e-4)
    assert large.stage.network.compute_dtype == large.frozen_dtype == "bfloat16"
