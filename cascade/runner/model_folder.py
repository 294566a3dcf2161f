"""Models: folders of ours, by path or by the name of one that ships, and public pipelines.

A model folder holds `config.json` ({"format": "cascade", "stages": [names], ...}), one folder a
stage (`config.json`, `model.safetensors`) and `text_encoder/` in the usual Hugging Face layout,
unless its `text_encoder` names one on the Hugging Face hub. A stage that does not share that
encoder has its own in its folder. Each folder has a SHA256SUMS, which its files must match. Reading
one runs no code.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from cascade.config import from_json, read_json
from cascade.errors import UserError
from cascade.published import earlier_versions
from cascade.published.pipelines import Pipelines, is_pipeline
from cascade.ranges import shown
from cascade.stage import Stage, StageConfig
from cascade.storage import checksums, paths, weights
from cascade.storage.network import Published
from cascade.text import DEFAULT_MAX_TOKENS, clip
from cascade.text.captions import Captions
from cascade.text.embedding import TextEncoder

VERSION = 2
"""What config.json says of the layout. Version 1 named parameters otherwise; it still opens."""
MOST_STAGES = 16
"""A cascade has at most so many stages: from 8 px that many would draw more than 2^18."""
MOST_TOKENS = 4096
"""A prompt is padded or cut to at most so many tokens; memory grows with their square."""
SHIPPED = pathlib.Path(__file__).parents[1] / "pretrained"


def open_model(name_or_dir: str | os.PathLike[str]) -> ModelFolder | Pipelines:
    """A model by what a person calls it, for whatever is to be done with it.

    The cascade that ships (`scenes`), a folder that `cascade export` or `cascade convert` wrote,
    here or in object storage, or pipelines in diffusers' layout: their folders, or their names on
    the Hugging Face hub, with a comma between them. Reads config files alone. Raises UserError that
    says what is missing or damaged.
    """
    names = str(name_or_dir).split(",")
    return Pipelines(names) if is_pipeline(names[0]) else ModelFolder(name_or_dir)


class ModelFolder:
    """A model in our own layout. What it says of itself comes from its config files."""

    def __init__(self, name_or_dir: str | os.PathLike[str]):
        """A folder of that name with a model in it wins over a model that ships."""
        self.name = str(name_or_dir)
        self._folder = _found(name_or_dir)
        self._about = _described(self._folder)

    @functools.cached_property
    def stages(self) -> list[StageConfig]:
        """Their configs, smallest first; no weights are read."""
        return [self._stage(name)[0] for name in self._about["stages"]]

    @property
    def text_encoder(self) -> str:
        """What `T5Encoder.load` takes: the text encoder that its stages share."""
        if named := self._about.get("text_encoder"):
            return named
        # The local copy of a model in object storage is gone when this process ends.
        folder = self.name if "://" in self.name else self._folder
        return f"{folder}/text_encoder"

    @property
    def max_tokens(self) -> int:
        """Length that prompts are padded or cut to."""
        return self._about.get("max_tokens", DEFAULT_MAX_TOKENS)

    @property
    def captions(self) -> Captions:
        """What is done to a prompt first."""
        return from_json(Captions, self._about.get("captions", "verbatim"), "captions")

    @property
    def known_words(self) -> Sequence[str]:
        """All the words that training captions had, if that is a closed list."""
        return self._about.get("known_words", ())

    def own_text_encoder(self, stage: str) -> Published | None:
        """The text encoder of a stage that does not share the model's."""
        folder = self._folder / stage
        return clip.text_encoder(folder) if (folder / "text_encoder").is_dir() else None

    def load_own_text_encoder(self, stage: str, dtype: Any) -> TextEncoder | None:
        """The same, loaded."""
        if self.own_text_encoder(stage) is None:
            return None
        return clip.CLIPTextEncoder.load(self._folder / stage, compute_dtype=dtype)

    def files(self, stage: str) -> list[pathlib.Path]:
        """The files that hold a stage's weights."""
        return [self._folder / stage / "model.safetensors"]

    def read(
        self,
        config: StageConfig,
        shardings: Callable[[Any], Any] | None = None,
        *,
        dtype: str | None = None,
    ) -> Any:
        """The parameters of its stage of that name, each read straight onto its devices.

        config: the stage's, or one that differs in how it computes. shardings: parameters as
        ShapeDtypeStructs -> the placement of each; None is the default device. dtype: theirs; None
        is what pictures are drawn with.
        """
        own, old = self._stage(config.name)
        kind = jnp.dtype(dtype or config.weights_dtype)
        target = weights.as_target(Stage(config).abstract(), lambda _: kind, shardings)
        renamed = earlier_versions.old_path(own) if old else str
        folder = self._folder / config.name
        with weights.opened(folder, "model", what="stage", convert="`cascade convert`") as opened:
            origins = weights.own_origins(target, renamed)
            weights.fit(opened.name, opened.shapes, origins, target)
            return weights.read(opened, origins, target)

    def copy_stage(self, stage: str, folder: pathlib.Path) -> None:
        """Write a stage as a new folder of a model, as it is; UserError for a damaged file."""
        for file in checksums.files_under(self._folder / stage):
            checksums.check(file)
        shutil.copytree(self._folder / stage, folder)

    def _stage(self, name: str) -> tuple[StageConfig, bool]:
        """Its config, and whether an earlier version wrote its folder."""
        file = self._folder / name / "config.json"
        checksums.check(file)
        value = read_json(file)
        config = from_json(StageConfig, earlier_versions.upgraded(value), str(file))
        return config, earlier_versions.is_old(value)


def shipped() -> list[str]:
    """The names of the models that ship."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))


def update_digest(digest: Any, file: pathlib.Path) -> None:
    """With the bytes of a file that may be larger than memory. digest: one of hashlib's."""
    paths.check_regular(file)
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)


def _found(name_or_dir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder meant; for one in object storage, a local copy."""
    folder = paths.path(name_or_dir)
    if not (folder / "config.json").is_file() and str(name_or_dir) in shipped():
        return SHIPPED / str(name_or_dir)
    if not folder.exists():
        raise UserError(
            f"model {name_or_dir}: no such folder, and not one that ships ({', '.join(shipped())})"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {folder}: holds no config.json; give a folder that `cascade export` wrote"
        )
    return paths.local_copy(folder)


def _described(folder: pathlib.Path) -> dict[str, Any]:
    """What a model folder's config.json says: `stages`, and perhaps `text_encoder`, `max_tokens`,
    `captions` and `known_words`.

    Raises UserError unless it is a cascade's, of a version that is known, whose stages are names of
    folders in this one.
    """
    file = folder / "config.json"
    checksums.check(file)
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != "cascade":
        raise UserError(f"{file}: not a cascade's; give a folder of `cascade export`")
    version = about.get("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(
            f"{file}: version must be 1 to {VERSION}, got {version!r}: a later version of this "
            "program wrote it; install that"
        )
    names = about.get("stages")
    if not isinstance(names, list) or not names or not all(map(_is_plain_name, names)):
        raise UserError(f"{file}: stages must list folder names, got {names!r}"[:200])
    if len(names) > MOST_STAGES:
        raise UserError(f"{file}: stages must list at most {MOST_STAGES} names, got {len(names)}")
    tokens = about.get("max_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise UserError(f"{file}: max_tokens must be 1 or more, got {tokens!r}"[:200])
    if tokens > MOST_TOKENS:
        raise UserError(f"{file}: max_tokens must be at most {MOST_TOKENS}, got {shown(tokens)}")
    encoder = about.get("text_encoder")
    if encoder is not None and (not isinstance(encoder, str) or "\0" in encoder):
        raise UserError(f"{file}: text_encoder must be a name, got {encoder!r}"[:200])
    from_json(Captions, about.get("captions", "verbatim"), f"{file}: captions")
    words = about.get("known_words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{file}: known_words must be a list of words, got {words!r}"[:200])
    return about


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
