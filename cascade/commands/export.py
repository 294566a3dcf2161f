"""Collect trained stages into a model folder for `sample --model`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.errors import UserError
from cascade.storage import paths

if TYPE_CHECKING:
    from cascade.stage import StageConfig
    from cascade.training.stage_training import Reading, StageJob


@dataclass(frozen=True, kw_only=True)
class Options:
    """Collect the EMA weights of trained stages into a model folder.

    DIR gets config.json, one folder a stage (config.json, model.safetensors) and text_encoder/; an
    encoder from the Hugging Face hub is not copied but named. It must be new or empty: nothing is
    overwritten.
    """

    folders: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WORKDIR [WORKDIR ...] DIR", help_behavior_hint="(required)"),
    ]
    """Folders of `cascade train` runs, one a stage, then the folder to write. gs:// and s3:// names
    are understood."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What weights are stored as; they are used as float32."""
    compute_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(
            metavar="{float32,bfloat16}", help_behavior_hint="(default: what they trained with)"
        ),
    ] = None
    """Type of the trained stages' activations when they draw: one trained on a GPU in bfloat16 is
    fast on a CPU in float32."""
    rest: Annotated[
        str | None, tyro.conf.arg(metavar="NAME|DIR", help_behavior_hint="(default: none)")
    ] = None
    """A model, as `cascade sample --model` names it, whose other stages are copied beside the
    trained ones: the model that training began from, or one like it."""
    ema: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: the usual)")
    ] = None
    """Width of a power-function average of the weights, as a share of the run in (0, 0.2886], that
    replaces the usual average; it is made of the snapshots of runs with ema_profiles."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade export` with the words after it. Raises UserError for a person's mistake."""
    options = config.parse(Options, argv, prog="cascade export")
    if len(options.folders) < 2:
        raise UserError("give at least one WORKDIR of `cascade train`, then the DIR to write")
    *workdirs, out = options.folders
    report = export(
        workdirs,
        out,
        dtype=options.dtype,
        ema=options.ema,
        rest=options.rest,
        compute_dtype=options.compute_dtype,
    )
    print(f"wrote {out}: {', '.join(report['stages'])}", file=sys.stderr)
    print(json.dumps(report))


def export(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    ema: float | None = None,
    rest: str | None = None,
    compute_dtype: str | None = None,
) -> dict:
    """Write the model folder, which appears whole or not at all; returns its config as JSON values.

    workdirs: folders of runs, one a stage. dtype: what weights are stored as. ema: None takes the
    runs' own averages; a number is the width sigma_rel of one made from their snapshots. rest: a
    model that gives the stages which no run has trained. compute_dtype: of the trained stages'
    activations; None is what they were trained with. Raises UserError when a workdir is no run,
    or the stages do not make one cascade.
    """
    from cascade.runner.cascade import check_chain
    from cascade.runner.model_folder import VERSION, open_model
    from cascade.storage import checksums
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.storage.weights import save_safetensors
    from cascade.text import t5

    runs = sorted((_run(paths.path(w), ema) for w in workdirs), key=lambda r: r.stage.resolution)
    trained = [run.stage.name for run in runs]
    start = None if rest is None else open_model(rest)
    reading = _reading(runs)
    others = [] if start is None else _others(start, trained)
    if start is not None and any(_shares_encoder(start, stage) for stage in others):
        reading = _common_reading(start, reading)
    stages = sorted([*(run.stage for run in runs), *others], key=lambda stage: stage.resolution)
    check_chain(stages)
    report: dict[str, Any] = {
        "format": "cascade",
        "version": VERSION,
        "stages": [stage.name for stage in stages],
    }
    encoder = None
    if reading is not None:
        report |= {"max_tokens": reading.max_tokens, "captions": reading.captions}
        # Without a slash a name is rather a folder that is not here than one of the hub.
        if t5.is_hub_name(reading.text_encoder) and "/" in reading.text_encoder.partition("@")[0]:
            report["text_encoder"] = reading.text_encoder
        else:
            encoder = _text_encoder(reading.text_encoder)
    report["trained"] = {
        run.stage.name: {
            "images": run.step * run.job.batch_size,
            "parameters": _count(run.weights),
            "seed": run.job.seed,
            **({} if ema is None else {"ema_sigma_rel": ema}),
        }
        for run in runs
    }
    # What the other stages had read is not known.
    if not others and all(run.job.vocabulary for run in runs):
        report["known_words"] = sorted({word for run in runs for word in run.job.vocabulary})
    with WholeFolder(out) as folder:
        for run in runs:
            where = folder / run.stage.name
            where.mkdir()
            stage = run.stage if compute_dtype is None else _computing_in(run.stage, compute_dtype)
            write_json(where / "config.json", config.to_json(stage))
            save_safetensors(where / "model.safetensors", run.weights, dtype=dtype)
        if start is not None:
            for stage in others:
                start.copy_stage(stage.name, folder / stage.name)
        if encoder is not None:
            t5.copy_folder(encoder, folder / "text_encoder")
        write_json(folder / "config.json", report)
        checksums.write_each(folder)
    return report


@dataclass(frozen=True)
class _TrainedRun:
    """A run that is exported: its job, and all of the stage's weights, averaged at a step."""

    job: StageJob
    step: int
    weights: Any

    @property
    def stage(self) -> StageConfig:
        return self.job.stage


def _run(workdir: paths.Path, sigma_rel: float | None) -> _TrainedRun:
    """Read a run's averages. Raises UserError unless the folder holds the run of a stage."""
    from cascade.stage import Stage
    from cascade.storage.checkpoint import Checkpoints
    from cascade.training.loop import frozen, saved_job, saved_weights
    from cascade.training.stage_training import StageJob

    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{workdir}: holds no checkpoints; give the --workdir of a `cascade train` run"
        )
    checkpoints = Checkpoints(workdir)
    step, weights, saved = checkpoints.restore_ema()
    checkpoints.close()
    job = saved_job(saved, str(workdir))
    if not isinstance(job, StageJob):
        raise UserError(
            f"{workdir}: holds a run of {job.name}, and a model is made of stages; of a text "
            "encoder's run, WORKDIR/text_encoder is what it made"
        )
    if sigma_rel is None:
        weights = saved_weights(job, saved, weights)
    else:
        step, weights = _reconstructed(workdir, job, step, sigma_rel)
    weights = job.trainable.whole(weights, frozen(job))
    if _shapes(weights) != _shapes(Stage(job.stage).abstract()):
        raise UserError(
            f"{workdir}: its weights are not those of a stage as its config says; one of them is "
            "damaged: remove the newest folder of checkpoints/ to export the one before"
        )
    return _TrainedRun(job, step, weights)


def _shapes(weights: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: tuple(x.shape), weights)


def _reading(runs: Sequence[_TrainedRun]) -> Reading | None:
    """How all the runs read texts. Raises UserError if they do it in several ways."""
    told = [
        ("different text encoders", "text_encoder", ", ".join),
        ("captions of {} tokens", "max_tokens", lambda values: str([int(v) for v in values])),
        ("captions {}", "captions", " and ".join),
    ]
    found = [run.job.reading for run in runs if run.job.reading is not None]
    for what, field, join in told:
        values = sorted({str(getattr(reading, field)) for reading in found})
        if len(values) > 1:
            said = what.format(join(values)) if "{" in what else f"{what}: {join(values)}"
            raise UserError(f"the stages were trained on {said}")
    return found[0] if found else None


def _computing_in(stage: StageConfig, dtype: str) -> StageConfig:
    network: Any = dataclasses.replace(stage.network, **{"compute_dtype": dtype})
    return dataclasses.replace(stage, network=network)


def _count(weights: Any) -> int:
    import jax
    import numpy as np

    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(weights))


def _text_encoder(name):
    """The folder of a run's text encoder, which is no name of the hub."""
    from cascade.text.t5 import SHIPPED, locate

    if name in SHIPPED or paths.path(name).expanduser().is_dir():
        return locate(name)
    raise UserError(
        f"the run's text_encoder={name!r} is no folder here; export from the directory that "
        "`cascade train` was started in, or put the folder back there"
    )


def _others(start: Any, trained: Sequence[str]) -> list[StageConfig]:
    """The stages of the model --rest that no run has trained."""
    others = [stage for stage in start.stages if stage.name not in trained]
    if not others:
        raise UserError(
            f"--rest {start.name}: has no stage but those trained, {', '.join(trained)}"
        )
    return others


def _shares_encoder(model: Any, stage: StageConfig) -> bool:
    """Whether a stage of the model reads text by the encoder that its stages share."""
    return stage.text is not None and model.own_text_encoder(stage.name) is None


def _common_reading(start: Any, reading: Reading | None) -> Reading:
    """How the runs and the stages of --rest read texts. Raises UserError if not alike."""
    from cascade.text.t5 import locate, read_config
    from cascade.training.stage_training import Reading

    if reading is None:
        return Reading(start.text_encoder, start.max_tokens, start.captions)
    rest = start.name
    for what, flag, theirs, ours in (
        ("as so many tokens", "--text-tokens", start.max_tokens, reading.max_tokens),
        ("prepared so", "--captions", start.captions, reading.captions),
    ):
        if theirs != ours:
            raise UserError(
                f"--rest {rest}: its stages read captions {what}: {theirs}, and the runs' {ours}; "
                f"train with {flag} {theirs} to put them beside each other"
            )
    theirs, ours = start.text_encoder, reading.text_encoder
    if theirs != ours and read_config(locate(theirs)) != read_config(locate(ours)):
        raise UserError(f"--rest {rest}: its text encoder {theirs} is not the runs' {ours}")
    return reading


def _reconstructed(workdir, job, last, sigma_rel):
    """(step, weights) of the average of this width at the newest snapshot, made of all of them."""
    from cascade.published import earlier_versions
    from cascade.stage import Stage
    from cascade.storage.weights import load_safetensors
    from cascade.training import ema

    # A run that was set back has snapshots from after its newest checkpoint.
    found = [
        (int(m[1]), float(m[2]), path)
        for path in sorted((workdir / "ema").glob("*.safetensors"))
        if (m := re.fullmatch(r"(\d+)_([\d.e-]+)\.safetensors", path.name)) and int(m[1]) <= last
    ]
    if not found:
        raise UserError(
            f"{workdir}: holds no snapshots to make --ema {sigma_rel} of; train with "
            "ema_profiles=(0.05, 0.1), or export without --ema"
        )
    steps, widths, files = zip(*found, strict=True)
    try:
        wanted = ema.gamma_from_sigma_rel(sigma_rel)
    except ValueError as e:
        raise UserError(f"--ema: {e}") from None
    gammas = [ema.gamma_from_sigma_rel(width) for width in widths]
    shares = ema.posthoc_weights(steps, gammas, max(steps), wanted)
    abstract, renamed = Stage(job.stage).abstract(), earlier_versions.old_path_of(job)
    trees = (load_safetensors(path, abstract, renamed) for path in files)
    return max(steps), ema.combine(shares, trees)
