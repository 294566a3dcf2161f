import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors

from cascade import testing
from cascade.commands.export import _reconstructed, export
from cascade.config import load
from cascade.data import BSR
from cascade.devices import sharding
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.models import EfficientLevel, EfficientUNetConfig, Level, UNetConfig
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.stage import Stage
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.weights import load_safetensors
from cascade.text import T5Encoder
from cascade.training import ema as averages
from cascade.training import loop, preview, stage_training
from cascade.training.job import Job, Optimizer
from cascade.training.log import TrainingLog
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.step import begin, make_train_step
from cascade.training.trainable import LoRA

ENCODER = testing.FakeEncoder()


def config_of(**changes):
    return StageTraining(
        **{
            "stage": testing.base_stage(),
            "data": ScenesData(),
            "images": 64,
            "batch_size": 8,
            "optimizer": Optimizer(learning_rate=1e-2),
            **changes,
        }
    )


def batch_of(n=8):
    rng = np.random.default_rng(0)
    text = ENCODER([f"word{i}" for i in range(n)])
    image = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "text": text.values, "text_mask": text.mask}


def run(config, mesh_config, steps, optimizer=None):
    """State and metrics after each step on one batch, with everything placed as `fit` does."""
    n = abs(mesh_config.data * mesh_config.fsdp * mesh_config.tensor)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n])
    optimizer = optimizer or config.transformation()
    begun = functools.partial(begin, config, optimizer)
    state = jax.jit(begun)(testing.lively(Stage(config.stage)))
    placement = sharding.shardings(state, mesh)
    step = jax.jit(
        make_train_step(config, optimizer, mesh),
        in_shardings=(placement, sharding.batch_sharding(mesh)),
        out_shardings=(placement, sharding.replicated(mesh)),
    )
    state, batch = jax.device_put(state, placement), sharding.shard_batch(batch_of(), mesh)
    after = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        after.append((state, metrics))
    return after


ATTENDING = EfficientLevel(width=16, blocks=1, stride=1, self_attention=True, text_attention=True)
ONE_LEVEL = EfficientUNetConfig(levels=(ATTENDING,), head_width=8)


def moved_by_the_gradient(mesh, microbatches=1):
    """State and metrics after one step of SGD at rate 1."""
    stage = dataclasses.replace(testing.base_stage(), network=ONE_LEVEL)
    config = config_of(stage=stage, microbatches=microbatches)
    return run(config, mesh, steps=1, optimizer=optax.sgd(1.0))[0]


@pytest.fixture(scope="module")
def alone():
    """On one device, the whole batch at once."""
    return moved_by_the_gradient(MeshConfig(data=1))


@pytest.mark.parametrize(
    "data,fsdp,tensor,microbatches", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 4), (2, 2, 2, 2)]
)
def test_any_mesh_and_any_microbatches_give_the_loss_and_gradients_of_one_device(
    data, fsdp, tensor, microbatches, alone
):
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    state, metrics = moved_by_the_gradient(mesh, microbatches)
    assert np.isclose(metrics["loss"], alone[1]["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        state["train"]["params"],
        alone[0]["train"]["params"],
    )
    split = str({x.sharding.spec for x in jax.tree.leaves(state)})
    assert ("fsdp" in split, "tensor" in split) == (fsdp > 1, tensor > 1)


def test_parts_of_a_batch_are_given_the_noise_that_the_whole_batch_gives_them():
    stage = Stage(testing.super_resolution_stage())
    params, key = testing.lively(stage), jax.random.key(3)
    batch = batch_of() | {"lowres": batch_of()["image"]}
    batch["image"] = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    whole = jax.jit(stage.loss)(params, batch, key)[0]
    loss = jax.jit(lambda rows, i: stage.loss(params, rows, key, (i, 4))[0])
    parts = [loss({k: v[i::4] for k, v in batch.items()}, i) for i in range(4)]
    assert np.ptp(parts) > 1e-3
    assert np.isclose(np.mean(parts), whole, rtol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulled(Job):
    """A weight that is pulled to 1, in place of a network: its sums and limits are known."""

    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

    def fresh(self, key):
        return {"w": jnp.array([0.0, 3.0, -2.0])}

    def loss(self, params, batch, key, part=None):
        value = jnp.mean(jnp.square(params["w"] - 1))
        return value, {"loss": value}

    def transformation(self):
        return self.optimizer.build(self.batch_size, self.steps)


def pulled(**changes):
    defaults = {"images": 64, "batch_size": 8, "optimizer": Optimizer(learning_rate=1e-2)}
    return Pulled(**{**defaults, **changes})


def pull(job):
    """A compiled step of a job, and its state before the first."""
    optimizer = job.transformation()
    state = begin(job, optimizer, job.fresh(jax.random.key(0)))
    return jax.jit(make_train_step(job, optimizer)), state


def test_ema_follows_its_recursion_with_warm_up():
    step, state = pull(pulled(ema_decay=0.3))
    for n in range(1, 6):
        before, (state, _) = state["ema"]["w"], step(state, {})
        # (1 + n) / (10 + n) passes 0.3 at the third step.
        decay = (2 / 11, 3 / 12, 0.3, 0.3, 0.3)[n - 1]
        want = decay * before + (1 - decay) * state["train"]["params"]["w"]
        np.testing.assert_allclose(state["ema"]["w"], want, atol=1e-6)


def test_averages_kept_besides_follow_their_profiles_and_make_others(tmp_path, monkeypatch):
    config = pulled(ema_profiles=(0.05, 0.1))
    step, state = pull(config)
    path = []
    for i in range(1, 13):
        state, _ = step(state, {})
        path.append(np.asarray(state["train"]["params"]["w"]))
        if i % 4 == 0:
            loop._snapshot(state["train"]["profiles"], tmp_path, i)

    def expected(width):
        # The weights after step i hold from i - 1 to i; gamma is the profile's exponent.
        edges = (np.arange(13) / 12) ** (averages.gamma_from_sigma_rel(width) + 1)
        return np.diff(edges) @ np.stack(path)

    for width in config.ema_profiles:
        kept = state["train"]["profiles"][str(width)]["w"]
        np.testing.assert_allclose(kept, expected(width), atol=1e-5)
    assert np.all(np.abs(expected(0.05) - expected(0.1)) > 1e-4)

    class Abstract:
        def __init__(self, config):
            pass

        def abstract(self):
            return {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}

    monkeypatch.setattr("cascade.stage.Stage", Abstract)
    monkeypatch.setattr("cascade.published.earlier_versions.old_path_of", lambda job: str)
    config = config_of()
    for width, tolerance in [(0.05, 1e-5), (0.07, 1e-3), (0.1, 1e-5)]:
        last, weights = _reconstructed(tmp_path, config, 12, width)
        assert last == 12
        np.testing.assert_allclose(weights["w"], expected(width), atol=tolerance)
    assert _reconstructed(tmp_path, config, 11, 0.1)[0] == 8  # as if set back to before the last


@pytest.mark.parametrize("name", ["adam", "adamw", "adafactor"])
def test_every_optimizer_lowers_the_loss(name):
    rate = 0.1 if name == "adafactor" else 1e-2
    step, state = pull(pulled(images=4_000, optimizer=Optimizer(name=name, learning_rate=rate)))
    losses = []
    for _ in range(500):
        state, metrics = step(state, {})
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3 and losses[-1] < 0.1


SUPER = testing.super_resolution_stage()
DEEP = UNetConfig(levels=tuple(Level(width=8, blocks=1) for _ in range(3)), head_width=8)
POSITIVE = (
    *("images", "batch_size", "microbatches", "text_tokens", "keep", "skip_limit"),
    *("log_every_images", "save_every_images", "ema_snapshot_images"),
)
FROM_ZERO = ("seed", "workers", "preview_every_images", "profile_steps")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"microbatches": 3}, "multiple of microbatches=3"),
        ({"crop": 4}, "crop is for super-resolution"),
        ({"degradation": BSR()}, "degradation is for super-resolution"),
        ({"stage": testing.super_resolution_stage(), "crop": 5}, "upsampling factor 2"),
        (
            {
                "stage": dataclasses.replace(SUPER, network=DEEP),
                "crop": 6,
            },
            "stage sr16 of crop=6: image sides must be multiples of 4",
        ),
        ({"trainable": LoRA(rank=2)}, r"trainable must be Weights\(\) without an init"),
        *(({name: 0}, rf"StageTraining\.{name} must be at least 1, got 0") for name in POSITIVE),
        *(({name: -1}, rf"StageTraining\.{name} must be at least 0, got -1") for name in FROM_ZERO),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


# The loop, on rendered scenes at 8 px with the text encoder that ships.


def scenes_config(**changes):
    return config_of(
        stage=testing.smallest_stage(text_width=128),
        data=ScenesData(split="train"),
        mesh=MeshConfig(data=2, fsdp=4),
        log_every_images=8,
        save_every_images=32,
        preview_every_images=0,
        **changes,
    )


def weights(workdir):
    step, ema, _ = Checkpoints(workdir).restore_ema()
    return step, ema


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch):
    """On the same mesh; on other ones it goes on with the same numbers, up to rounding."""
    config = scenes_config(ema_profiles=(0.05, 0.1), ema_snapshot_images=32, text_tokens=16)
    assert fit(config, tmp_path / "whole") is True
    assert fit(config, tmp_path / "parts", until=24) is True
    assert rows(tmp_path / "parts")[-1]["images"] == 24
    alone = jax.devices()[:1]
    for name, mesh in (("three", MeshConfig(data=2, fsdp=2, tensor=2)), ("none", MeshConfig())):
        shutil.copytree(tmp_path / "parts", tmp_path / name)
        with monkeypatch.context() as patched:
            if name == "none":
                patched.setattr(jax, "devices", lambda: alone)
            fit(dataclasses.replace(config, mesh=mesh), tmp_path / name)
        losses = [[r["loss"] for r in rows(tmp_path / run)] for run in ("whole", name)]
        assert len(losses[0]) == 8 and np.allclose(*losses, rtol=1e-5)
        (_, there), (_, here) = weights(tmp_path / "whole"), weights(tmp_path / name)
        # As a whole: Adam makes as much of gradients that are rounding alone as of any.
        assert optax.tree.norm(_minus(there, here)) < 1e-3 * optax.tree.norm(there)
    fit(config, tmp_path / "parts")
    (n, whole), (m, parts) = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert n == m == 8
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [
        r["loss"] for r in rows(tmp_path / "parts")
    ]
    # The averages kept besides are the same too; --ema makes others of their snapshots.
    snapshots = {run: tmp_path / run / "ema" for run in ("whole", "parts")}
    names = {f"000000000{step}_{width}.safetensors" for step in (4, 8) for width in (0.05, 0.1)}
    assert {p.name for p in snapshots["whole"].iterdir()} == names
    abstract = Stage(config.stage).abstract()
    last = "0000000008_0.1.safetensors"
    kept, also = (load_safetensors(snapshots[run] / last, abstract) for run in snapshots)
    jax.tree.map(np.testing.assert_array_equal, kept, also)
    made = {}
    for width in (0.05, 0.08, 0.1):
        out = tmp_path / f"model{width}"
        report = export([tmp_path / "whole"], out, ema=width)
        assert report["trained"]["base8"]["ema_sigma_rel"] == width
        made[width] = load_safetensors(out / "base8" / "model.safetensors", abstract)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), made[0.1], kept)
    # A width between two lies between them, in distance to the narrower.
    distance = [float(optax.tree.norm(_minus(made[w], made[0.05]))) for w in (0.08, 0.1)]
    assert 0 < distance[0] < distance[1]
    with pytest.raises(UserError, match="sigma_rel must lie in"):
        export([tmp_path / "whole"], tmp_path / "none", ema=0.5)
    # What captions were cut to, prompts are.
    assert Cascade.load(tmp_path / "model0.1").encoder.max_tokens == 16
    with pytest.raises(ValueError, match="sigma_rel must lie in"):
        dataclasses.replace(config, ema_profiles=(0.5,))


def test_a_run_that_is_told_again_to_end_finishes_its_checkpoint(tmp_path, monkeypatch):
    usual, add, close = [], TrainingLog.add, Checkpoints.close
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(TrainingLog, "add", lambda *given: (add(*given), terminate()))
    # What the last save began is still being written here.
    monkeypatch.setattr(Checkpoints, "close", lambda self: (terminate(), terminate(), close(self)))
    before = signal.signal(signal.SIGTERM, lambda number, frame: usual.append(number))
    try:
        assert fit(scenes_config(), tmp_path) is False
        assert usual == []
        terminate()
        assert usual == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert weights(tmp_path)[0] == 1


def _minus(a, b):
    """On the host: sums over eight simulated devices, one after the other, can wait for ever."""
    return jax.tree.map(lambda x, y: x - y, *jax.device_get((a, b)))


def test_a_finished_run_writes_its_pictures_and_holds_no_text_encoder(tmp_path):
    config = scenes_config(preview_prompts=("a red circle", "a blue square"))
    config = dataclasses.replace(config, profile_steps=2)
    fit(dataclasses.replace(config, preview_every_images=64), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *"checkpoints config.json metrics.jsonl tensorboard loss.png previews profile".split(),
    }
    assert any(p.is_file() for p in (tmp_path / "profile").rglob("*"))
    assert [p.name for p in (tmp_path / "previews").iterdir()] == ["0000000064.png"]
    assert set(rows(tmp_path)[-1]) >= {
        *("step", "images", "loss", "grad_norm", "update_norm", "param_norm", "skipped"),
        *("images_per_second", "step_seconds", "data_wait_seconds", "tflops_per_device"),
    }
    abstract = Stage(config.stage).abstract()
    assert jax.tree.structure(weights(tmp_path)[1]) == jax.tree.structure(abstract)


@pytest.mark.parametrize("base", [True, False])
def test_a_preview_encodes_the_prompts_of_a_base_and_fetches_the_batch_of_the_others(
    base, monkeypatch
):
    encoded, fetched, fetch = [], [], sharding.fetch
    monkeypatch.setattr(sharding, "fetch", lambda tree: fetched.append(tree) or fetch(tree))

    class Drawer(Stage):
        def sample(self, params, given, keys, *, settings, negative, sides=(8, 8)):
            assert params == {"w": 1} and {len(x) for x in given["text"]} == {len(keys)}
            assert set(given) == ({"text"} if base else {"text", "lowres"})
            return jnp.zeros((len(keys), *sides, 3))

    stage = testing.base_stage() if base else testing.super_resolution_stage()
    batch = batch_of() | {"lowres": batch_of()["image"]}
    batch["image"] = batch["image"].repeat(2, 1).repeat(2, 2)

    def encoder(texts):
        encoded.append(texts)
        return ENCODER(texts)

    drawn = preview.draw(Drawer(stage), {"w": 1}, batch, ["a b", "c"], encoder)
    assert encoded == ([["a b", "c"]] if base else [])
    used = {"text"} if base else set(batch)
    assert {name for tree in fetched for part in tree if part for name in part} == {"w", *used}
    assert drawn.shape == ((8, 18, 3) if base else (4 * 18 - 2, 3 * 18 - 2, 3))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run of scenes_config() that stopped after two steps."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    fit(scenes_config(), workdir, until=16)
    return workdir


def test_resuming_with_another_network_is_refused(started):
    config = scenes_config()
    text = dataclasses.replace(config.stage.text, dropout=0.5)
    other = dataclasses.replace(config, stage=dataclasses.replace(config.stage, conditions=(text,)))
    with pytest.raises(UserError, match="conditions.0.dropout: 0.1 before, 0.5 now"):
        fit(other, started)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"batch_size": 16}, "batch_size: 8 before, 16 now"),
        ({"optimizer": Optimizer(name="adafactor")}, "optimizer.name: adam before, adafactor now"),
        ({"ema_profiles": (0.05,)}, r"ema_profiles: \[\] before, \[0.05\] now"),
        ({"trainable": LoRA(rank=2), "init": "x"}, "trainable.rank: None before, 2 now"),
        ({"stage": testing.smallest_stage()}, "stage.conditions.0.width: 128 before, 8 now"),
    ],
)
def test_resuming_with_what_a_run_cannot_change_is_refused_by_name(changes, message, started):
    config = dataclasses.replace(scenes_config(), **changes)
    told = rf"run: holds a run with another config \({message}\); use its config, or another"
    with pytest.raises(UserError, match=told):
        fit(config, started)
    assert [p.name for p in (started / "checkpoints").iterdir()] == ["2"]


def test_a_stage_and_a_text_encoder_do_not_share_a_folder(started, tmp_path):
    files = {p: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    another = r"another kind \(StageTraining, this is a TextPretraining\); name another --workdir"
    with pytest.raises(UserError, match=another):
        fit(load("configs/scenes/text_encoder.py"), started)
    assert {p: p.read_bytes() for p in started.rglob("*") if p.is_file()} == files
    earlier = Path(__file__).parents[1] / "fixtures" / "version_0_1_0" / "text_run"
    another = r"another kind \(TextPretraining, this is a StageTraining\); name another --workdir"
    with pytest.raises(UserError, match=another):
        fit(scenes_config(), shutil.copytree(earlier, tmp_path / "earlier"))


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(started, tmp_path, monkeypatch):
    workdir, read_config = shutil.copytree(started, tmp_path / "run"), Checkpoints.read_config

    def read_older(self):
        saved = read_config(self)
        del saved["stage"]["variance"], saved["trainable"]
        return saved

    monkeypatch.setattr(Checkpoints, "read_config", read_older)
    fit(scenes_config(), workdir, until=24)
    assert rows(workdir)[-1]["images"] == 24


@pytest.mark.parametrize("state", ["{}", "[]", "5", '{"examples": "x"}', '{"examples": -8}'])
def test_a_damaged_place_in_the_data_is_told_with_the_checkpoint(started, tmp_path, state):
    workdir = shutil.copytree(started, tmp_path / "run")
    (step,) = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()]
    (workdir / "checkpoints" / step / "data" / "metadata").write_text(state)
    (workdir / "checkpoints" / step / "SHA256SUMS").unlink()  # as if it had been written so
    with pytest.raises(UserError, match=f"the place in the data of checkpoint {step} is damaged"):
        fit(scenes_config(), workdir, until=24)


def test_a_run_may_start_from_the_weights_of_a_model(started, tmp_path):
    export([started], tmp_path / "model")
    with pytest.raises(UserError, match="holds no snapshots to make --ema 0.1 of"):
        export([started], tmp_path / "other", ema=0.1)
    start = scenes_config(
        init=str(tmp_path / "model"), optimizer=Optimizer(learning_rate=1e-50), seed=1
    )
    fit(start, tmp_path / "second", until=16)
    (_, first), (_, second) = weights(started), weights(tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    renamed = dataclasses.replace(start, stage=dataclasses.replace(start.stage, name="other"))
    with pytest.raises(UserError, match="has no stage other"):
        fit(renamed, tmp_path / "third")


def test_a_diverging_run_skips_updates_then_stops_with_the_state_that_was_good(tmp_path):
    wild = scenes_config(skip_limit=3, optimizer=Optimizer(learning_rate=1e30, clip=1e30))
    with pytest.raises(UserError, match="training diverged: the last 3 updates"):
        fit(wild, tmp_path)
    skipped = [row["skipped"] for row in rows(tmp_path)]
    assert skipped[-3:] == [1, 1, 1] and rows(tmp_path)[-1]["loss"] is None
    step, ema = weights(tmp_path)
    assert step == len(skipped) < wild.steps
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ema))


def test_text_of_another_width_is_refused_before_training(tmp_path):
    config = dataclasses.replace(scenes_config(), stage=testing.base_stage(text_width=8))
    told = r"embeddings are 128 wide, and stage base8 takes 8 \(its Text.width\)"
    with pytest.raises(UserError, match=told):
        fit(config, tmp_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steep(Pulled):
    """Its loss is finite where its gradient is not: the root of nothing."""

    def loss(self, params, batch, key, part=None):
        value = jnp.sqrt(jnp.sum(0 * params["w"]))
        return value, {"loss": value}


def test_an_update_that_is_not_finite_is_left_out_though_the_loss_is():
    step, before = pull(Steep(images=64, batch_size=8))
    after, metrics = step(before, {})
    assert float(metrics["loss"]) == 0 and bool(metrics["skipped"])
    for name in ("params", "opt_state"):
        kept = jax.tree.map(np.array_equal, after["train"][name], before["train"][name])
        assert all(jax.tree.leaves(kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy(Pulled):
    """Its loss is the first number of the step's key."""

    def loss(self, params, batch, key, part=None):
        value = jax.random.normal(key) + 0 * params["w"].sum()
        return value, {"loss": value}


def test_every_step_of_every_seed_has_noise_of_its_own():
    seen = []
    for seed in (0, 1):
        step, state = pull(Noisy(images=64, batch_size=8, seed=seed))
        for _ in range(3):
            state, metrics = step(state, {})
            seen.append(float(metrics["loss"]))
    assert len(set(seen)) == 6


def test_what_is_exported_is_the_average_of_the_weights(started, tmp_path):
    config = scenes_config()
    rule = config.transformation()
    target = jax.eval_shape(
        lambda params: begin(config, rule, params), Stage(config.stage).abstract()
    )
    _, state, ema, _ = Checkpoints(started).restore(**target)
    report = export([started], tmp_path / "model", dtype="float16", compute_dtype="bfloat16")
    (told,) = open_model(tmp_path / "model").stages
    network = dataclasses.replace(config.stage.network, compute_dtype="bfloat16")
    assert told == dataclasses.replace(config.stage, network=network)
    assert {"circle", "red"} < set(report["known_words"])
    file = tmp_path / "model/base8/model.safetensors"
    with safetensors.safe_open(file, "np") as f:
        assert {f.get_slice(n).get_dtype() for n in f.keys()} == {"F16"}
    exported = load_safetensors(file, Stage(config.stage).abstract())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), exported, ema)
    # After two steps the weights themselves are elsewhere.
    assert optax.tree.norm(_minus(ema, state["params"])) > 5e-4 * optax.tree.norm(
        jax.device_get(ema)
    )


def test_the_config_says_what_a_run_reads(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    given, load = {}, T5Encoder.load

    def batches(data, **options):
        given.update(options)
        raise Stop

    monkeypatch.setattr(stage_training, "batches", batches)
    monkeypatch.setattr(T5Encoder, "load", lambda *a, **k: given.update(k) or load(*a, **k))
    config = dataclasses.replace(
        scenes_config(
            seed=5,
            workers=1,
            captions="lower",
            text_int8=True,
        ),
        stage=testing.super_resolution_stage(text_width=128),
        crop=8,
        degradation=BSR(),
    )
    with pytest.raises(Stop):
        fit(config, tmp_path)
    names = ("seed", "workers", "captions", "crop", "degradation", "batch_size")
    assert {n: given[n] for n in names} == {n: getattr(config, n) for n in names}
    assert given["int8"] is True and given["lowres_resolution"] == 8


class NoData:
    def __next__(self):
        raise StopIteration

    get_state = set_state = __next__


def test_a_seed_decides_the_first_weights():
    def first(seed):
        config = scenes_config(seed=seed)
        mesh, rule = sharding.make_mesh(config.mesh), config.transformation()
        return loop._initial_state(config, rule, mesh, None, None, NoData())[0]["ema"]

    same, other = (optax.tree.norm(_minus(first(0), first(seed))) for seed in (0, 1))
    assert same == 0 < other
