"""The loss of what is held out: by noise level, the same again, and told in rows and plot."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from written import pairs, records

from cascade import testing
from cascade.devices import distributed, sharding
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.scenes.training import ScenesTraining
from cascade.stage import Stage, StageConfig
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import LEVELS, StageTraining


def textless() -> StageConfig:
    return dataclasses.replace(testing.smallest_stage(), conditions=())


@pytest.fixture
def job(tmp_path):
    return job_of(pairs(tmp_path / "d", records(24)))


def job_of(data) -> StageTraining:
    return StageTraining(
        stage=textless(),
        data=data,
        images=64,
        batch_size=8,
        log_every_images=16,
        preview_every_images=0,
        validation=0.4,
        validate_every_images=32,
        optimizer=Optimizer(learning_rate=1e-3),
    )


@pytest.fixture(scope="module", autouse=True)
def plain_curves():
    """Here they are drawn."""


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out(rows):
    return [{k: v for k, v in r.items() if k.startswith("validation/")} for r in rows]


def test_rows_have_it_when_it_is_due(job, tmp_path):
    assert fit(job, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["images"] for row in rows if "validation/loss" in row] == [32, 64]
    for figures in held_out(rows)[1::2]:
        levels = [figures[f"validation/loss_{a:.2f}-{b:.2f}"] for a, b in LEVELS]
        assert figures["validation/loss"] == pytest.approx(np.mean(levels))
        assert all(0 < level < 10 for level in levels)
    assert (tmp_path / "run" / "loss.png").is_file()
    with pytest.raises(UserError, match="another config .validation: 0.4 before, 0.2 now"):
        fit(dataclasses.replace(job, validation=0.2), tmp_path / "run")


def run_in_a_group(data, folder):
    """What one of several processes does, which share the batches of what is held out."""
    job = dataclasses.replace(job_of(data), mesh=MeshConfig(data=1, fsdp=-1))
    with distributed.processes():
        assert fit(job, folder)


def test_several_processes_have_the_validation_of_one(tmp_path):
    data, folders = pairs(tmp_path / "d", records(24)), (tmp_path / "two", tmp_path / "one")
    for count, folder in ((2, folders[0]), (1, folders[1])):
        group = (
            processes.start_group(count, run_in_a_group, data, folder)
            if count > 1
            else [processes.start(run_in_a_group, data, folder)]
        )
        assert processes.codes(group) == [0] * count
    two, one = ([row for row in held_out(rows_of(folder)) if row] for folder in folders)
    assert len(two) == len(one) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 1 + len(LEVELS)


def test_the_levels_together_are_the_loss_over_all_of_them():
    """Of equal parts of the times; the noise differs, so the means of many are compared."""
    stage = Stage(textless())
    params = testing.lively(stage)
    batch = {"image": jnp.full((512, 8, 8, 3), 200, jnp.uint8)}

    def mean(**options):
        return float(stage.loss(params, batch, jax.random.key(3), **options)[0])

    parts = [mean(between=level) for level in LEVELS]
    assert np.mean(parts) == pytest.approx(mean(), rel=0.05) and np.std(parts) > 0


def test_it_is_of_the_averaged_weights_and_changes_nothing(job, tmp_path):
    without = dataclasses.replace(job, validation=0.0)
    mesh = sharding.make_mesh(job.mesh)
    running = job.open(mesh, tmp_path)
    params = job.fresh(jax.random.key(0))
    first, again = running.validate(params), running.validate(params)
    assert first == again and running.validate_every_images == 32
    other = running.validate(jax.tree.map(lambda x: x + 0.3, params))
    assert other["validation/loss"] != first["validation/loss"]
    assert without.open(mesh, tmp_path).validate(params) == {}
    assert without.open(mesh, tmp_path).validate_every_images == 0


def test_shares_that_make_no_sense_are_refused(job):
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="validation must be a share in"):
            dataclasses.replace(job, validation=share)
    from cascade.scenes.dataset import ScenesData

    with pytest.raises(ValueError, match="ScenesTraining.validation must be 0"):
        ScenesTraining(stage=textless(), data=ScenesData(), images=8, batch_size=8, validation=0.1)
