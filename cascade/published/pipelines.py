"""Pipelines of diffusers as stages of a cascade, DeepFloyd IF's and the x4 upscaler's alike.

The `_class_name` of model_index.json says which kind a pipeline is; `deepfloyd/stage.py` and
`x4_upscaler/stage.py` read one of their kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade.config import read_json
from cascade.errors import UserError
from cascade.published.deepfloyd import stage as deepfloyd
from cascade.published.hub import locate
from cascade.published.x4_upscaler import stage as upscaler

PublishedStage = deepfloyd.Pipeline | upscaler.UpscalePipeline
"""One published stage on disk, of any kind."""


def is_pipeline(name: str | Path) -> bool:
    """Tell whether a model of that name is one of diffusers' pipelines, here or on the hub."""
    folder = Path(name).expanduser()
    return (folder / "model_index.json").is_file() or (
        not folder.exists() and str(name).startswith(("DeepFloyd/", "stabilityai/"))
    )


def pipelines(names: Sequence[str | Path]) -> list[PublishedStage]:
    """Read the stages of these folders or hub names, which are stage I, II and III or some of them.

    No weights are read, but those of a hub name are downloaded.
    Raises UserError naming the file and the field that is not of DeepFloyd IF or the upscaler, and
    for a name that `hub.locate` does not find.
    """
    found: list[PublishedStage] = []
    for name in names:
        folder = locate(name)
        index = folder / "model_index.json"
        lowres = found[-1].config.resolution if found else None
        kind = read_json(index).get("_class_name")
        if kind in deepfloyd.KINDS:
            config = deepfloyd.stage_config(folder, lowres)
            found.append(deepfloyd.Pipeline(folder=folder, config=config))
        elif kind == upscaler.KIND:
            config = upscaler.stage_config(folder, lowres)
            found.append(upscaler.UpscalePipeline(folder=folder, config=config))
        else:
            known = " or ".join((*deepfloyd.KINDS, upscaler.KIND))
            raise UserError(f"{index}: _class_name must be {known}, got {kind!r}")
    return found
