"""`cascade export`: the EMA weights of trained stages -> a model folder for `cascade sample`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cascade import config, paths
from cascade.errors import UserError


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
    ema: float | None = None
    """Instead of the usual average of the weights, the power-function average of this width, a part
    of the run in (0, 0.2886], made of the snapshots that runs with ema_profiles have."""


def main(argv: Sequence[str]) -> None:
    options = config.parse(Options, argv, prog="cascade export")
    if len(options.folders) < 2:
        raise UserError("give at least one WORKDIR of `cascade train`, then the DIR to write")
    *workdirs, out = options.folders
    print(json.dumps(export(workdirs, out, dtype=options.dtype, ema=options.ema)))


def export(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    ema: float | None = None,
) -> dict:
    """Write the model folder; returns what it holds, as JSON values.

    ema: None for the runs' own averages, or the width sigma_rel of one made from their snapshots.
    Raises UserError when a workdir is no run, or the runs do not make one cascade. `out` appears
    whole or not at all.
    """
    import numpy as np

    from cascade import lora
    from cascade.checkpoint import Checkpoints, WholeFolder, save_safetensors, write_json
    from cascade.data import known_words
    from cascade.text.encoder import is_hub_name, locate
    from cascade.text.folder import copy_folder
    from cascade.train import TrainConfig, init_params

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
    names = [run.stage.name for run, _, _ in runs]
    encoders = {run.text_encoder for run, _, _ in runs}
    for (below, _, _), (above, _, _) in zip(runs, runs[1:], strict=False):
        if above.stage.lowres_resolution != below.stage.resolution:
            raise UserError(
                f"stage {above.stage.name} enlarges {above.stage.lowres_resolution} px, but "
                f"{below.stage.name} draws {below.stage.resolution} px: they make no cascade"
            )
    if len(encoders) > 1:
        raise UserError(
            f"the stages were trained on different text encoders: {', '.join(encoders)}"
        )
    tokens = {run.text_tokens for run, _, _ in runs}
    if len(tokens) > 1:
        raise UserError(f"the stages were trained on captions of {sorted(tokens)} tokens")
    captions = {run.captions for run, _, _ in runs}
    if len(captions) > 1:
        raise UserError(f"the stages were trained on captions {' and '.join(sorted(captions))}")
    report = {
        "format": "cascade",
        "version": 1,
        "stages": names,
        "max_tokens": tokens.pop(),
        "captions": captions.pop(),
        "trained": {},
    }
    if words := known_words([run.data for run, _, _ in runs]):
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
        if is_hub_name(encoder := encoders.pop()):
            report["text_encoder"] = encoder
        else:
            copy_folder(locate(encoder), folder / "text_encoder")
        write_json(folder / "config.json", report)
    return report


def _reconstructed(workdir, stage, last, sigma_rel):
    """(step, weights): the average of this width after the newest snapshot, of all of them."""
    from cascade import ema
    from cascade.checkpoint import load_safetensors
    from cascade.stage import Stage

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
    steps, widths, paths = zip(*found, strict=True)
    try:
        wanted = ema.gamma_from_sigma_rel(sigma_rel)
    except ValueError as e:
        raise UserError(f"--ema: {e}") from None
    gammas = [ema.gamma_from_sigma_rel(width) for width in widths]
    shares = ema.posthoc_weights(steps, gammas, max(steps), wanted)
    abstract = Stage(stage).abstract()
    return max(steps), ema.combine(shares, (load_safetensors(p, abstract) for p in paths))


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
