"""Public weights (DeepFloyd IF, x4 upscaler) to a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cascade import config
from cascade.errors import UserError

USAGE = (
    "cascade convert deepfloyd --stage1 DIR [--stage2 DIR] [--stage3 DIR] [--text-encoder DIR] OUT"
)
MORE = """
Convert DeepFloyd IF from diffusers' pipelines to a model folder, which `cascade sample --model`
and configs read, and which needs less memory at loading.

`cascade convert deepfloyd --help` tells of each word.
"""

_source = tyro.conf.arg(metavar="DIR", help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class DeepFloydOptions:
    """Convert DeepFloyd IF from diffusers' pipelines to a model folder.

    OUT gets config.json, one folder a stage (config.json, model.safetensors; stage III also its own
    text_encoder/ and tokenizer/) and text_encoder/. It must be new or empty. Weights are converted
    tensor by tensor: memory for the largest one is enough.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    stage1: Annotated[str | None, _source] = None
    """A folder, or a name such as DeepFloyd/IF-I-XL-v1.0: text to 64 px."""
    stage2: Annotated[str | None, _source] = None
    """A folder, or a name such as DeepFloyd/IF-II-L-v1.0: 64 to 256 px."""
    stage3: Annotated[str | None, _source] = None
    """A folder, or stabilityai/stable-diffusion-x4-upscaler: 256 to 1024 px."""
    text_encoder: Annotated[str | None, _source] = None
    """A folder, or a name on the Hugging Face hub, with T5 v1.1's encoder and spiece.model; the
    default is that of stage I."""
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        tyro.conf.arg(
            metavar="{float32,float16,bfloat16}", help_behavior_hint="(default: as they are now)"
        ),
    ] = None
    """What weights are stored as."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade convert` with the words after it. Raises UserError for a person's mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n{MORE}", end="")
        return
    if argv[0] != "deepfloyd":
        raise UserError(f"cascade convert {argv[0]}: only `cascade convert deepfloyd` exists")
    options = config.parse(DeepFloydOptions, argv[1:], prog="cascade convert deepfloyd")
    print(json.dumps(convert_deepfloyd(options)))


def convert_deepfloyd(options: DeepFloydOptions) -> dict:
    """Write the model folder, which appears whole or not at all; returns its config.json.

    Raises UserError where nothing is given to convert, or what is given is missing or damaged.
    """
    from cascade.published.pipelines import Pipelines
    from cascade.runner.model_folder import VERSION
    from cascade.storage import checksums
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.text import t5

    given = (options.stage1, options.stage2, options.stage3)
    names = [name for name in given if name is not None]
    if not names:
        raise UserError(f"nothing to convert: {USAGE}")
    model = Pipelines(names)
    spelled = {None: None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[options.dtype]
    stages = [stage.name for stage in model.stages]
    shared = any(model.own_text_encoder(stage) is None for stage in stages)
    encoder = t5.locate(options.text_encoder or model.text_encoder) if shared else None
    report = {
        "format": "cascade",
        "version": VERSION,
        "stages": stages,
        "max_tokens": model.max_tokens,
        "captions": model.captions,
    }
    with WholeFolder(options.out) as folder:
        for stage in stages:
            model.copy_stage(stage, folder / stage, spelled)
        if encoder is not None:
            t5.copy_folder(encoder, folder / "text_encoder", spelled)
        write_json(folder / "config.json", report)
        checksums.write_each(folder)
    return report
