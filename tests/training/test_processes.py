"""Runs in processes of their own: several as one, killed, terminated, started again."""

import dataclasses
import json
import os
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from cascade import images, testing
from cascade.commands import sample
from cascade.commands.train import STOPPED
from cascade.devices import distributed
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.runner import cascade as runner
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.stage import Stage
from cascade.storage.checkpoint import Checkpoints
from cascade.text.t5 import read_folder
from cascade.training import log as training_log
from cascade.training import stage_training
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.text_job import SENTINELS

STEPS = 12
SETTINGS = dict(
    stage=testing.smallest_stage(text_width=128),  # every process traces and compiles it
    data=ScenesData(split="train"),
    images=STEPS * 8,
    batch_size=8,
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=Optimizer(learning_rate=1e-3),
    log_every_images=8,
    save_every_images=32,
    preview_every_images=0,
)
CONFIG = StageTraining(**SETTINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights(StageTraining):
    """In place of a network: large weights, moved by pictures, text and noise; quick to compile."""

    def fresh(self, key):
        parts = jax.random.normal(key, (8, 128, 128))
        return {str(i): {"kernel": part} for i, part in enumerate(parts)}

    def loss(self, params, batch, key, part=None):
        given = images.to_float(batch["image"]).mean((1, 2, 3)) + batch["text"].mean((1, 2))
        target = given + jax.random.normal(key, given.shape)
        value = sum(jnp.tanh(x["kernel"]).sum(-1) for x in params.values())
        error = jnp.square(value - target[:, None]).mean()
        return error, {"loss": error}


def run_weights(workdir, seconds_a_step=0.0):
    """`run`, of Weights."""
    run(workdir, seconds_a_step, Weights(**SETTINGS))


def run_long(workdir, seconds_a_step=0.0):
    """`run_weights`, longer, with a checkpoint after every step."""
    run(workdir, seconds_a_step, Weights(**SETTINGS | {"images": 20 * 8, "save_every_images": 8}))


def run(workdir, seconds_a_step=0.0, config=CONFIG):
    """What `cascade train` does with its config; notes which rows of each batch were loaded.

    Exits with STOPPED where `fit` says so.
    """
    training_log._plot_loss = lambda *_: None  # half of the time of a small step
    load = stage_training.batches

    class Slow:
        def __init__(self, source, **options):
            rows = [int(r) for r in options["rows"]]
            (workdir / f"rows_{jax.process_index()}").write_text(json.dumps(rows))
            self.batches = load(source, **options)
            self.get_state, self.set_state = self.batches.get_state, self.batches.set_state
            self.bad_records = []

        def __next__(self):
            (workdir / f"began_{jax.process_index()}").touch()
            time.sleep(seconds_a_step)
            return next(self.batches)

    stage_training.batches = Slow
    with distributed.processes():
        ended = fit(config, workdir)
    if not ended:
        sys.exit(STOPPED)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """(process count, function that runs) -> folder of an uninterrupted run."""
    done = {}

    def get(count, run):
        if (count, run) not in done:
            folder = done[count, run] = tmp_path_factory.mktemp(f"whole{count}")
            group = (
                [processes.start(run, folder, environment=cache)]
                if count == 1
                else processes.start_group(count, run, folder, environment=cache)
            )
            assert processes.codes(group) == [0] * count
        return done[count, run]

    return get


def weights(workdir):
    step, ema, _ = Checkpoints(workdir).restore_ema()
    return step, ema


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def assert_ends_like(workdir, reference, steps=STEPS):
    (n, a), (m, b) = weights(workdir), weights(reference)
    assert n == m == steps
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert losses(workdir) == losses(reference)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def begun(workdir, count=1):
    return lambda: all((workdir / f"began_{i}").exists() for i in range(count))


@pytest.mark.parametrize("count,run", [(2, run), (4, run_weights)])
def test_several_processes_train_like_one(count, run, whole):
    many = whole(count, run)
    assert np.allclose(losses(many), losses(whole(1, run)), rtol=1e-4)
    rows = [json.loads((many / f"rows_{i}").read_text()) for i in range(count)]
    assert sorted(sum(rows, [])) == list(range(8)) and {len(r) for r in rows} == {8 // count}
    shards = {p.name for p in (many / "checkpoints" / str(STEPS) / "train").iterdir()}
    assert shards >= {f"ocdbt.process_{i}" for i in range(count)}
    assert len(list((many / "tensorboard").iterdir())) == 1


def test_a_run_killed_at_ten_moments_ends_like_an_uninterrupted_one(tmp_path, whole, cache):
    """launch/soak.sh kills one as often as one likes."""

    def newest():
        names = [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    moments, killed = random.Random(0), 0
    for i in range(10):
        (tmp_path / "began_0").unlink(missing_ok=True)
        before = newest()
        process = processes.start(run_long, tmp_path, 0.1, environment=cache)
        # Every other time it may get somewhere first.
        wait_for(
            lambda p=process, n=before, further=i % 2: (
                not p.is_alive() or (newest() > n if further else begun(tmp_path)())
            )
        )
        process.join(moments.uniform(0, 0.1))
        process.kill()
        killed += processes.codes([process]) == [-9]
    assert killed == 10
    assert processes.codes([processes.start(run_long, tmp_path, environment=cache)]) == [0]
    assert_ends_like(tmp_path, whole(1, run_long), steps=20)


def test_several_processes_stop_together_and_go_on(tmp_path, whole, cache):
    """A SIGTERM to one saves and stops all in peace, which all know to be no end; when one is
    killed the others end by error."""
    group = processes.start_group(2, run_weights, tmp_path, 0.4, environment=cache)
    wait_for(begun(tmp_path, 2))
    group[1].terminate()
    group[1].terminate()  # being told twice does not interrupt the saving
    assert processes.codes(group, 60) == [STOPPED, STOPPED]
    stopped = Checkpoints(tmp_path).steps()[-1]
    assert 1 <= stopped < STEPS

    group = processes.start_group(2, run_weights, tmp_path, 0.4, environment=cache)
    wait_for(lambda: max(Checkpoints(tmp_path).steps()) > stopped)
    group[0].kill()
    left, lost = processes.codes(group[1:], 60)[0], processes.codes(group[:1])[0]
    assert lost == -9 and left not in (0, 2, -9)  # -9: it hung for a minute

    group = processes.start_group(2, run_weights, tmp_path, environment=cache)
    assert processes.codes(group) == [0, 0]
    assert_ends_like(tmp_path, whole(2, run_weights))


ENCODER = T5Config(
    vocab_size=360 + SENTINELS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
)


def pretrain(workdir):
    job = TextPretraining(
        encoder=ENCODER,
        images=3 * 8,
        batch_size=8,
        length=16,
        warmup_images=8,
        vocabulary_captions=50,
        mesh=MeshConfig(data=1, fsdp=-1),
        log_every_images=8,
        preview_every_images=3 * 8,
    )
    with distributed.processes():
        assert fit(job, workdir)


def test_several_processes_make_one_text_encoder(whole):
    """And one vocabulary, and one preview."""
    one, two = whole(1, pretrain), whole(2, pretrain)
    assert np.allclose(losses(two), losses(one), rtol=1e-4)
    assert (one / "spiece.model").read_bytes() == (two / "spiece.model").read_bytes()
    names = {str(p.relative_to(two)) for p in two.rglob("*") if p.is_file()}
    assert {"previews/0000000024.png", "text_encoder/config.json"} <= names
    assert not any(".partial" in name for name in names)
    (config, ours, _), (_, theirs, _) = (read_folder(d / "text_encoder") for d in (two, one))
    assert config == ENCODER
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), ours, theirs)


def draw(out):
    def load(*args, **options):
        stage = Stage(testing.smallest_stage())
        return runner.Cascade([(stage, testing.lively(stage))], testing.FakeEncoder())

    runner.Cascade.load = load
    words = ["a red circle", "a blue square", "a green star", "--num", "2", "--until", "8"]
    sample.main([*words, "--out", str(out), "--steps", "2", "--no-compilation-cache"])


def test_several_processes_draw_the_files_of_one(tmp_path, cache):
    for folder, count in (("one", 1), ("two", 2)):
        out = tmp_path / folder
        if count == 1:
            group = [processes.start(draw, out, environment=cache)]
        else:
            group = processes.start_group(count, draw, out, environment=cache)
        assert processes.codes(group) == [0] * count
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert len(one) == 13 and one == two


def run_unlike(workdir):
    """Each process is given another learning rate."""
    own = float(os.environ["JAX_PROCESS_ID"])
    sys.stderr = open(workdir.parent / f"stderr_{own:.0f}", "w")
    with distributed.processes():
        fit(dataclasses.replace(CONFIG, optimizer=Optimizer(learning_rate=1e-3 + own)), workdir)


def test_processes_that_were_started_unlike_end_at_once_and_say_how(tmp_path):
    group = processes.start_group(2, run_unlike, tmp_path / "run")
    assert processes.codes(group, 100) == [2, 2]
    told = "process 1 of 2 was started with another config than process 0"
    assert all(told in (tmp_path / f"stderr_{i}").read_text() for i in range(2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES must be a number"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS must be"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"},
            "HOST:PORT",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2"},
            "0..1",
        ),
    ],
)
def test_half_a_description_of_the_processes_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        distributed.join(environment)


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # the job's script
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_clusters_are_told_by_their_variables(environment, expected):
    assert distributed.in_cluster(environment) == expected
