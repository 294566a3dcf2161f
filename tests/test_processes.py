"""Runs in processes of their own: several as one, killed, terminated, started again.

By default few and small. CASCADE_KILLS=20 kills at twenty moments, CASCADE_PROCESSES=2,4 also runs
four processes as one.
"""

import json
import os
import random
import time

import jax
import numpy as np
import processes
import pytest

from cascade import distributed, runner, sample, testing, train
from cascade.checkpoint import Checkpoints
from cascade.data import ScenesData
from cascade.errors import UserError
from cascade.sharding import MeshConfig
from cascade.train import Optimizer, TrainConfig

KILLS = int(os.environ.get("CASCADE_KILLS", 2))
COUNTS = [int(n) for n in os.environ.get("CASCADE_PROCESSES", "2").split(",")]
STEPS = 24
CONFIG = TrainConfig(
    stage=testing.base_stage(text_width=128),
    data=ScenesData(split="train"),
    images=STEPS * 8,
    batch_size=8,
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=Optimizer(learning_rate=1e-3),
    log_every_images=8,
    save_every_images=8,
    preview_every_images=0,
)


def run(workdir, seconds_a_step=0.0):
    """What `cascade train` does with its config; notes which rows of each batch were loaded."""
    load = train.batches

    class Slow:
        def __init__(self, **options):
            rows = [int(r) for r in options["rows"]]
            (workdir / f"rows_{jax.process_index()}").write_text(json.dumps(rows))
            self.batches = load(CONFIG.data, **options)
            self.get_state, self.set_state = self.batches.get_state, self.batches.set_state

        def __next__(self):
            (workdir / f"began_{jax.process_index()}").touch()
            time.sleep(seconds_a_step)
            return next(self.batches)

    train.batches = lambda config, **options: Slow(**options)
    with distributed.processes():
        train.train(CONFIG, workdir)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """process count -> folder of an uninterrupted run."""
    done = {}

    def get(count):
        if count not in done:
            folder = done[count] = tmp_path_factory.mktemp(f"whole{count}")
            group = (
                [processes.start(run, folder, environment=cache)]
                if count == 1
                else processes.start_group(count, run, folder, environment=cache)
            )
            assert processes.codes(group) == [0] * count
        return done[count]

    return get


def weights(workdir):
    step, ema, _ = Checkpoints(workdir).restore_ema()
    return step, ema


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def assert_ends_like(workdir, reference):
    (n, a), (m, b) = weights(workdir), weights(reference)
    assert n == m == STEPS
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert losses(workdir) == losses(reference)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def begun(workdir, count=1):
    return lambda: all((workdir / f"began_{i}").exists() for i in range(count))


@pytest.mark.parametrize("count", COUNTS)
def test_several_processes_train_like_one(count, whole):
    many = whole(count)
    assert np.allclose(losses(many), losses(whole(1)), rtol=1e-4)
    rows = [json.loads((many / f"rows_{i}").read_text()) for i in range(count)]
    assert sorted(sum(rows, [])) == list(range(8)) and {len(r) for r in rows} == {8 // count}
    shards = {p.name for p in (many / "checkpoints" / str(STEPS) / "train").iterdir()}
    assert shards >= {f"ocdbt.process_{i}" for i in range(count)}
    assert len(list((many / "tensorboard").iterdir())) == 1


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(tmp_path, whole, cache):
    moments, killed = random.Random(0), 0
    for _ in range(KILLS):
        (tmp_path / "began_0").unlink(missing_ok=True)
        process = processes.start(run, tmp_path, 0.05, environment=cache)
        wait_for(lambda p=process: begun(tmp_path)() or not p.is_alive())
        process.join(moments.uniform(0, 24 * 0.05 / max(1, KILLS / 4)))
        process.kill()
        killed += processes.codes([process]) == [-9]
    assert killed
    assert processes.codes([processes.start(run, tmp_path, environment=cache)]) == [0]
    assert_ends_like(tmp_path, whole(1))


def test_several_processes_stop_together_and_go_on(tmp_path, whole, cache):
    """A SIGTERM to one saves and ends all in peace; when one is killed the others end by error."""
    group = processes.start_group(2, run, tmp_path, 0.2, environment=cache)
    wait_for(begun(tmp_path, 2))
    group[1].terminate()
    assert processes.codes(group, 60) == [0, 0]
    stopped = Checkpoints(tmp_path).steps()[-1]
    assert 1 <= stopped < STEPS

    group = processes.start_group(2, run, tmp_path, 0.2, environment=cache)
    wait_for(lambda: max(Checkpoints(tmp_path).steps()) > stopped)
    group[0].kill()
    left, lost = processes.codes(group[1:], 60)[0], processes.codes(group[:1])[0]
    assert lost == -9 and left not in (0, 2, -9)  # -9: it hung for a minute

    assert processes.codes(processes.start_group(2, run, tmp_path, environment=cache)) == [0, 0]
    assert_ends_like(tmp_path, whole(2))


def draw(out):
    runner.Cascade.load = lambda *args, **options: testing.cascade()
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
