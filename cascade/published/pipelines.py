"""Models in diffusers' layout: the stages that some folders, or names on the hub, hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade.config import read_json, to_json
from cascade.errors import UserError
from cascade.published.deepfloyd import stage as deepfloyd
from cascade.published.hub import locate
from cascade.published.x4_upscaler import stage as upscaler
from cascade.stage import StageConfig
from cascade.storage import hub
from cascade.storage.network import Published
from cascade.storage.paths import write_json
from cascade.text import clip
from cascade.text.captions import Captions
from cascade.text.embedding import TextEncoder


class Pipelines:
    """The pipelines of some folders or hub names as one model, smallest stage first.

    It has the interface of `cascade.runner.model_folder.ModelFolder`. Making one reads config files
    alone, and raises UserError naming the file and the field that is not of such a pipeline.
    Its name has the commit of each that is the hub's.
    """

    max_tokens: int = deepfloyd.MAX_TOKENS
    captions: Captions = deepfloyd.CAPTIONS
    known_words: Sequence[str] = ()

    def __init__(self, names: Sequence[str | Path]):
        self.pipelines = pipelines(names)
        self.name = ",".join(map(_pinned, names, self.pipelines))

    @property
    def stages(self) -> list[StageConfig]:
        """Their configs; no weights are read."""
        return [pipeline.config for pipeline in self.pipelines]

    @property
    def text_encoder(self) -> str:
        """The T5 that its stages share lies in the first one's folder."""
        return str(self.pipelines[0].folder)

    def own_text_encoder(self, stage: str) -> Published | None:
        """The text encoder of a stage that does not share the model's."""
        found = self._pipeline(stage)
        own = isinstance(found, upscaler.UpscalePipeline)
        return clip.text_encoder(found.folder) if own else None

    def load_own_text_encoder(self, stage: str, dtype: Any) -> TextEncoder | None:
        """The same, loaded."""
        if self.own_text_encoder(stage) is None:
            return None
        return clip.CLIPTextEncoder.load(self._pipeline(stage).folder, compute_dtype=dtype)

    def files(self, stage: str) -> list[Path]:
        """The files that hold a stage's weights."""
        return self._pipeline(stage).files

    def read(
        self,
        config: StageConfig,
        shardings: Callable[[Any], Any] | None = None,
        *,
        dtype: str | None = None,
    ) -> Any:
        """The parameters of its stage of that name, each read straight onto its devices.

        dtype: theirs; None is what pictures are drawn with.
        """
        kind: Any = dtype or config.weights_dtype
        return self._pipeline(config.name).params(kind, shardings)

    def copy_stage(self, stage: str, folder: Path, dtype: str | None = None) -> None:
        """Write a stage as a new folder of a model, tensor by tensor.

        dtype: of the weights there, in safetensors' spelling; None is that of each.
        """
        pipeline = self._pipeline(stage)
        folder.mkdir()
        write_json(folder / "config.json", to_json(pipeline.config))
        pipeline.write(folder, dtype)

    def _pipeline(self, stage: str) -> PublishedStage:
        return next(p for p in self.pipelines if p.config.name == stage)


def is_pipeline(name: str | Path) -> bool:
    """Tell whether a model of that name is one of diffusers' pipelines, here or on the hub."""
    folder = Path(name).expanduser()
    return (folder / "model_index.json").is_file() or (
        not folder.exists() and str(name).startswith(("DeepFloyd/", "stabilityai/"))
    )


def _pinned(name: str | Path, pipeline: PublishedStage) -> str:
    """The name of a pipeline with the commit that was read, if it is one of the hub."""
    commit = None if Path(name).expanduser().is_dir() else hub.commit(pipeline.folder)
    return f"{str(name).partition('@')[0]}@{commit}" if commit else str(name)


PublishedStage = deepfloyd.Pipeline | upscaler.UpscalePipeline
"""One published stage on disk, of any kind."""


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
        told = read_json(index)
        kind = told.get("_class_name") if isinstance(told, dict) else None
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
