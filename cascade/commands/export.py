"""Collect trained stages into a model folder for `sample --model`."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cascade import config
from cascade.errors import UserError
from cascade.storage import paths


@dataclass(frozen=True, kw_only=True)
class Options:
    """Collect the EMA weights of trained stages into a model folder.

    DIR gets config.json, one folder a stage (config.json, model.safetensors) and text_encoder/; an
    encoder from the Hugging Face hub is not copied but named.
    It must be new or empty: nothing is overwritten.
    """

    folders: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR [WORKDIR ...] DIR")
    ]
    """Folders of `cascade train` runs, one a stage, then the folder to write. gs:// and s3:// names
    are understood."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What weights are stored as; they are used as float32."""
    rest: str | None = None
    """A model, as `cascade sample --model` has it, whose other stages go beside the trained ones,
    their weights as they are stored: the model that training began from, or one like it."""
    ema: float | None = None
    """Instead of the usual average of the weights, the power-function average of this width, a part
    of the run in (0, 0.2886], made of the snapshots that runs with ema_profiles have."""


def main(argv: Sequence[str]) -> None:
    options = config.parse(Options, argv, prog="cascade export")
    if len(options.folders) < 2:
        raise UserError("give at least one WORKDIR of `cascade train`, then the DIR to write")
    *workdirs, out = options.folders
    report = export(workdirs, out, dtype=options.dtype, ema=options.ema, rest=options.rest)
    print(json.dumps(report))


def export(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    ema: float | None = None,
    rest: str | None = None,
) -> dict:
    """Write the model folder; returns what it holds, as JSON values.

    ema: None for the runs' own averages, or the width sigma_rel of one made from their snapshots.
    rest: a model that gives the stages which no run has trained.
    Raises UserError when a workdir is no run, or the stages do not make one cascade. `out` appears
    whole or not at all.
    """
    import numpy as np

    from cascade.data import known_words
    from cascade.published.deepfloyd.stage import Start
    from cascade.storage.checkpoint import Checkpoints
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.storage.weights import save_safetensors
    from cascade.text.t5 import copy_folder, is_hub_name
    from cascade.training import lora
    from cascade.training.loop import TrainConfig, init_params

    runs = []
    for workdir in map(paths.path, workdirs):
        if not (workdir / "checkpoints").is_dir():
            raise UserError(
                f"{workdir}: holds no checkpoints; give the --workdir of a `cascade train` run"
            )
        checkpoints = Checkpoints(workdir)
        step, weights, saved = checkpoints.restore_ema()
        checkpoints.close()
        run = config.from_json(TrainConfig, saved, str(workdir))
        if ema is not None:
            step, weights = _reconstructed(workdir, run.stage, step, ema)
        if run.lora_rank:
            weights = lora.merged(init_params(run), weights)
        runs.append((run, step, weights))
    runs.sort(key=lambda run: run[0].stage.resolution)
    encoders = {run.text_encoder for run, _, _ in runs}
    if len(encoders) > 1:
        raise UserError(
            f"the stages were trained on different text encoders: {', '.join(encoders)}"
        )
    encoder = encoders.pop()
    # Without a slash a name is rather a folder that is not here than one of the hub.
    named = is_hub_name(encoder) and "/" in encoder
    own_encoder = None if named else _text_encoder(encoder)
    tokens = {run.text_tokens for run, _, _ in runs}
    if len(tokens) > 1:
        raise UserError(f"the stages were trained on captions of {sorted(tokens)} tokens")
    captions = {run.captions for run, _, _ in runs}
    if len(captions) > 1:
        raise UserError(f"the stages were trained on captions {' and '.join(sorted(captions))}")
    trained = [run.stage for run, _, _ in runs]
    start = None if rest is None else Start(model=str(rest))
    others = [] if start is None else _others(start, runs[0][0], [stage.name for stage in trained])
    stages = sorted([*trained, *others], key=lambda stage: stage.resolution)
    bases = [stage.name for stage in stages if stage.lowres_resolution is None]
    if len(bases) > 1:
        raise UserError(
            f"stages {' and '.join(bases)} draw from text alone: a cascade has one such; leave out "
            "the others"
        )
    for below, above in itertools.pairwise(stages):
        if above.lowres_resolution != below.resolution:
            raise UserError(
                f"stage {above.name} enlarges {above.lowres_resolution} px, but {below.name} draws "
                f"{below.resolution} px: they make no cascade"
            )
    report = {
        "format": "cascade",
        "version": 1,
        "stages": [stage.name for stage in stages],
        "max_tokens": tokens.pop(),
        "captions": captions.pop(),
        "trained": {},
    }
    # What the other stages had read is not known.
    if not others and (words := known_words([run.data for run, _, _ in runs])):
        report["known_words"] = words
    with WholeFolder(out) as folder:
        for run, step, weights in runs:
            where = folder / run.stage.name
            where.mkdir()
            write_json(where / "config.json", config.to_json(run.stage))
            save_safetensors(where / "model.safetensors", weights, dtype=dtype)
            count = sum(int(np.prod(x.shape)) for x in _leaves(weights))
            report["trained"][run.stage.name] = {
                "images": step * run.batch_size,
                "parameters": count,
                "seed": run.seed,
                **({} if ema is None else {"ema_sigma_rel": ema}),
            }
        if start is not None:
            for stage in others:
                start.copy_stage(stage.name, folder / stage.name)
        if own_encoder is None:
            report["text_encoder"] = encoder
        else:
            copy_folder(own_encoder, folder / "text_encoder")
        write_json(folder / "config.json", report)
    return report


def _text_encoder(name):
    """The folder of a run's text encoder, which is no name of the hub."""
    from cascade.text.t5 import SHIPPED, locate

    if name in SHIPPED or paths.path(name).expanduser().is_dir():
        return locate(name)
    raise UserError(
        f"the run's text_encoder={name!r} is no folder here; export from the directory that "
        "`cascade train` was started in, or put the folder back there"
    )


def _others(start, run, trained):
    """The stages of the model --rest that are not trained; UserError unless they read the text as
    the run's do."""
    from cascade.text.t5 import locate, read_config

    rest = start.model
    others = [stage for stage in start.stages() if stage.name not in trained]
    if not others:
        raise UserError(f"--rest {rest}: has no stage but those trained, {', '.join(trained)}")
    if all(start.own_text_encoder(stage) for stage in others):
        return others
    for what, theirs, ours in (
        ("captions of so many tokens", start.max_tokens(), run.text_tokens),
        ("captions prepared", start.captions(), run.captions),
    ):
        if theirs != ours:
            raise UserError(f"--rest {rest}: reads {what}: {theirs}, the runs {ours}")
    theirs, ours = start.text_encoder(), run.text_encoder
    if theirs != ours and read_config(locate(theirs)) != read_config(locate(ours)):
        raise UserError(f"--rest {rest}: its text encoder {theirs} is not the runs' {ours}")
    return others


def _reconstructed(workdir, stage, last, sigma_rel):
    """(step, weights): the average of this width after the newest snapshot, of all of them."""
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
    abstract = Stage(stage).abstract()
    return max(steps), ema.combine(shares, (load_safetensors(p, abstract) for p in files))


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
