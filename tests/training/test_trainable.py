"""What trains, and what is frozen: the split, and runs that train a part of the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import testing
from cascade.commands.export import export
from cascade.config import to_json
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.stage import Stage
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.paths import write_json
from cascade.storage.weights import leaves, save_safetensors
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.step import begin, make_train_step, whole
from cascade.training.trainable import LoRA, Only, Weights

KEY = jax.random.key(3)
STAGE = testing.smallest_stage(text_width=128)
PATTERN = "conditions/text/(query|out)/|conv_in/kernel$"
BEGINNINGS = ("conditions/text/query/", "conditions/text/out/", "network/conv_in/kernel")


def paths(tree):
    return {path for path, _ in leaves(tree)}


@pytest.fixture(scope="module")
def params():
    return testing.lively(Stage(testing.base_stage()))


@pytest.mark.parametrize(
    "trainable,freezes",
    [(Weights(), False), (LoRA(rank=2), True), (Only(pattern="conditions/"), True)],
)
def test_what_is_split_is_whole_again(trainable, freezes, params):
    trained, frozen = trainable.split(params, KEY)
    assert trainable.freezes == freezes == bool(frozen)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    again = trainable.whole(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    other = jax.tree.map(lambda x: x + 1, trained)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trainable.whole(other, frozen), params)
    moved = {path for path, changed in leaves(moved) if changed}
    said = {
        Weights: paths(params),
        Only: {path for path in paths(params) if path.startswith("conditions/")},
        LoRA: {path for path in paths(params) if "attention/" in path and "kernel" in path},
    }
    assert moved == said[type(trainable)]


def test_what_trains_is_float32_whatever_it_began_as(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for trainable in (LoRA(rank=2), Only(pattern="conditions/")):
        trained, _ = trainable.split(half, KEY)
        assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}


def test_a_pattern_is_searched_for_in_whole_paths_and_leaves_no_empty_branches(params):
    trained, frozen = Only(pattern=PATTERN).split(params, KEY)
    assert paths(trained) | paths(frozen) == paths(params)
    assert paths(trained) == {
        "network/conv_in/kernel",
        *(f"conditions/text/{name}" for name in ("query/bias", "query/kernel")),
        *(f"conditions/text/{name}" for name in ("out/bias", "out/kernel")),
    }
    all_of_it, none = Only(pattern="").split(params, KEY)
    assert paths(all_of_it) == paths(params) and none == {}


def test_what_cannot_train_is_refused(params):
    with pytest.raises(ValueError, match=r"Only.pattern 'attentoin/' is found in no parameter's"):
        Only(pattern="attentoin/").split(params, KEY)
    with pytest.raises(ValueError, match=r"Only.pattern must be a regular expression, got '\('"):
        Only(pattern="(")
    with pytest.raises(ValueError, match=r"LoRA.rank must be at least 1, got 0; Weights\(\) has"):
        LoRA(rank=0)


def job_of(folder, **changes):
    """Fine-tunes a part of a model's stage on scenes."""
    defaults = {
        "stage": STAGE,
        "init": str(folder),
        "trainable": Only(pattern=PATTERN),
        "data": ScenesData(split="train"),
        "text_tokens": 16,
        "images": 32,
        "batch_size": 8,
        "optimizer": Optimizer(learning_rate=1e-2),
        "ema_decay": 0.5,
        "mesh": MeshConfig(data=2, fsdp=4),
        "log_every_images": 8,
        "save_every_images": 8,
        "preview_every_images": 0,
    }
    return StageTraining(**defaults | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("trainable") / "model"
    (folder / STAGE.name).mkdir(parents=True)
    write_json(folder / "config.json", {"format": "cascade", "stages": [STAGE.name]})
    write_json(folder / STAGE.name / "config.json", to_json(STAGE))
    weights = testing.lively(Stage(STAGE))
    save_safetensors(folder / STAGE.name / "model.safetensors", weights)
    return folder


def restored(workdir):
    """(step, averages, names of all else) of the newest checkpoint."""
    checkpoints = Checkpoints(workdir)
    step, ema, _ = checkpoints.restore_ema()
    checkpoints.close()
    held = json.loads((checkpoints.directory / str(step) / "train" / "_METADATA").read_text())
    keys = [one["key_metadata"] for one in held["tree_metadata"].values()]
    return step, ema, {"/".join(str(key["key"]) for key in path) for path in keys}


def test_only_what_matches_learns_is_kept_and_resumes_and_all_is_exported(model, tmp_path):
    job, parts = job_of(model), tmp_path / "parts"
    before = dict(leaves(open_model(model).read(STAGE)))
    said = {path for path in before if path.startswith(BEGINNINGS)}
    assert 0 < len(said) < len(before)
    assert fit(job, tmp_path / "whole")
    # In two parts it ends with the same numbers.
    assert fit(job, parts, until=16) and fit(job, parts)
    (step, ema, train), (_, again, _) = restored(tmp_path / "whole"), restored(parts)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, ema, again)
    losses = [
        [json.loads(line)["loss"] for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (tmp_path / "whole", parts)
    ]
    assert losses[0] == losses[1]
    # Nothing frozen is in the checkpoint, be it of weights, averages or the optimizer.
    assert paths(ema) == {p.removeprefix("params/") for p in train if "params/" in p} == said
    moments = {p.partition("/mu/")[2] for p in train if "/mu/" in p}
    assert moments == said and not any("film" in name for name in train)
    # The averages of what trains, and the rest as it was, are one model again.
    export([parts], tmp_path / "out")
    after = dict(leaves(open_model(tmp_path / "out").read(STAGE)))
    assert after.keys() == before.keys()
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == said
    for path, value in leaves(ema):
        np.testing.assert_array_equal(after[path], value)
    with pytest.raises(UserError, match=r"\(trainable.pattern: .* before, conditions/ now\)"):
        fit(job_of(model, trainable=Only(pattern="conditions/")), parts)
    with pytest.raises(UserError, match=rf"\(init: {model} before, {tmp_path / 'out'} now\)"):
        fit(job_of(tmp_path / "out"), parts)


def test_a_step_moves_what_trains_alone_and_frozen_weights_are_of_the_type_computed_in(model):
    stage = dataclasses.replace(
        STAGE, network=dataclasses.replace(STAGE.network, compute_dtype="bfloat16")
    )
    job = job_of(model, stage=stage)
    params = job.start()
    state = begin(job, job.transformation(), params)
    for path, value in leaves(state["train"]["params"]):
        # What trains begins where it was, and not where half the digits would have it.
        np.testing.assert_array_equal(value, dict(leaves(params))[path])
        assert value.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state["frozen"])} == {jnp.dtype("bfloat16")}
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "text": np.ones((8, 4, 128), np.float32),
        "text_mask": np.ones((8, 4), bool),
    }
    moved, metrics = jax.jit(make_train_step(job, job.transformation()))(state, batch)
    assert metrics["grad_norm"] > 0 and not metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, moved["frozen"], state["frozen"])
    apart = jax.tree.map(
        lambda a, b: bool((a != b).any()), moved["train"]["params"], state["train"]["params"]
    )
    assert all(jax.tree.leaves(apart))
    assert paths(whole(job, moved, moved["ema"])) == paths(params)


@pytest.mark.parametrize("trainable", [LoRA(rank=2), Only(pattern="conditions/")])
def test_what_is_frozen_needs_an_init_and_has_no_profiles(trainable):
    with pytest.raises(ValueError, match=r"trainable must be Weights\(\) without an init"):
        job_of("model", trainable=trainable, init=None)
    with pytest.raises(ValueError, match=r"ema_profiles must be \(\) unless trainable is Weights"):
        job_of("model", trainable=trainable, ema_profiles=(0.1,))
