"""CLIP as transformers publishes it: OpenAI's, OpenCLIP's, and any other of that layout.

A folder holds config.json, model.safetensors, the tokenizer's files and, if pictures are not
normalised as OpenAI's are, preprocessor_config.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from cascade import ranges
from cascade.config import read_json
from cascade.errors import UserError
from cascade.models import CLIPConfig, Network
from cascade.published import hub
from cascade.storage import checksums, paths, weights
from cascade.storage.network import Published, Shapes, read_config
from cascade.storage.weights import Origin
from cascade.text import clip as text_clip

_WANTED = (
    *("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
AT_ONCE = 16
"""So many pictures are looked at together."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's CLIP, and OpenCLIP's, were trained on pictures normalised by these."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CLIP:
    """A CLIP with its tokenizer: pictures and texts in, embeddings of length 1 out. It is frozen.

    >>> clip = load("openai/clip-vit-large-patch14")
    >>> pictures = np.stack([clip.prepare(picture) for picture in some])
    >>> cosines = clip.images(clip.params, pictures) @ clip.texts(["a red circle"]).T
    """

    name: str
    """The folder or the repository that it was loaded from."""
    config: CLIPConfig
    """The sizes of the network."""
    params: Any
    """The network's parameters, as nested dicts of arrays."""
    tokenizer: Any
    """A CLIPTokenizer of transformers."""
    mean: tuple[float, ...] = _MEAN
    """What is subtracted of pictures in [0, 1], by colour."""
    std: tuple[float, ...] = _STD
    """What they are then divided by, by colour."""
    digest: str = ""
    """The SHA-256 of its weights."""

    @property
    def scale(self) -> float:
        """What cosines are multiplied by for logits, at most 100: the inverse temperature."""
        return float(np.exp(np.asarray(self.params["logit_scale"], np.float64)))

    def prepare(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Bring a picture to the size that the network sees, on the host.

        Its shorter side is resized bicubically with antialiasing, and its middle is taken.
        """
        side = self.config.vision.image_size
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (int(side * width / short), int(side * height / short))
        image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))

    def images(self, params: Any, pictures: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Embed pictures that `prepare` gave; a pure function, float32."""
        x = normalised(pictures, self.mean, self.std)
        return Network(self.config).bind(params).image(x)

    def likeness(
        self, pictures: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str]
    ) -> Float[np.ndarray, " n"]:
        """The cosine of each picture and its text, -1 to 1, AT_ONCE at a time."""
        found, known = [], list(dict.fromkeys(texts))
        embedded = dict(zip(known, self.texts(known), strict=True))
        for start in range(0, len(pictures), AT_ONCE):
            some = [self.prepare(picture) for picture in pictures[start : start + AT_ONCE]]
            filled = np.stack(some + some[-1:] * (AT_ONCE - len(some)))
            found.append(np.asarray(_images(self, self.params, jnp.asarray(filled)))[: len(some)])
        own = np.stack([embedded[text] for text in texts])
        return (np.concatenate(found) * own).sum(axis=1)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Embed texts, float32. One that is too long keeps its beginning. Raises UserError for what
        is no text, and where weights give values that are not finite."""
        length = self.config.text.max_position_embeddings
        ids = text_clip.tokenize(self.tokenizer, texts, length).ids
        found = np.asarray(_texts(self.config, self.params, jnp.asarray(ids)))
        if not np.isfinite(found).all():
            raise UserError(
                f"CLIP {self.name}: gives embeddings that are not finite numbers; its weights are "
                "damaged: use others"
            )
        return found


def normalised(
    pictures: UInt8[Array, "b s s 3"],
    mean: tuple[float, ...] = _MEAN,
    std: tuple[float, ...] = _STD,
) -> Float[Array, "b s s 3"]:
    """Pictures in levels as CLIP's network takes them, by default OpenAI's."""
    return (pictures.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def load(name: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32") -> CLIP:
    """Load a CLIP from a folder, or from a repository of the Hugging Face hub (OWNER/NAME).

    compute_dtype: what it computes in. Raises UserError for what is missing, pickled, damaged or of
    another model; it says what to do.
    """
    folder = hub.find(
        name,
        what="CLIP",
        begins="config.json",
        kind="a CLIP of transformers, such as a download of openai/clip-vit-large-patch14",
        holds="config.json, model.safetensors, vocab.json, merges.txt, preprocessor_config.json",
        wanted=_WANTED,
    )
    network = published(folder)
    config = dataclasses.replace(
        network.config,
        text=dataclasses.replace(network.config.text, compute_dtype=compute_dtype),
        vision=dataclasses.replace(network.config.vision, compute_dtype=compute_dtype),
    )
    mean, std = _normalisation(folder, config.vision.image_size)
    tokenizer = text_clip.read_tokenizer(folder, config.text.vocab_size)
    if config.text.eos_token_id not in (2, tokenizer.eos_token_id):
        raise UserError(
            f"CLIP {name}: eos_token_id of config.json is {config.text.eos_token_id}, and that of "
            f"the tokenizer {tokenizer.eos_token_id}; both must be of one model"
        )
    return CLIP(
        name=str(name),
        config=config,
        params=network.read("float32"),
        tokenizer=tokenizer,
        mean=mean,
        std=std,
        digest=_digest(network.files),
    )


def published(folder: Path) -> Published:
    """Read the config of a folder, and say where its weights are. UserError naming the field."""
    return Published(
        folder=folder,
        config=read_config(folder, CLIPConfig.from_hf_dict, "transformers.CLIPModel"),
        what="CLIP",
        model="transformers.CLIPModel",
        stem="model",
        origins=_origins,
        ignored=r".*position_ids$",
    )


def write(folder: Path, config: CLIPConfig, params: Any, tokenizer: Path) -> None:
    """Write a folder that `load` and transformers open, with float16 weights.

    config: its eos_token_id must be the tokenizer's. tokenizer: the folder of its files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    towers = {}
    for name in ("text", "vision"):
        fields = dataclasses.asdict(getattr(config, name))
        fields.pop("compute_dtype")
        towers[f"{name}_config"] = {"model_type": f"clip_{name}_model", **fields}
    fields = {"model_type": "clip", "projection_dim": config.projection_dim, **towers}
    paths.write_json(folder / "config.json", fields)
    side = config.vision.image_size
    processor = {
        **{"image_processor_type": "CLIPImageProcessor", "resample": 3, "do_resize": True},
        **{"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}},
        **{"do_center_crop": True, "do_rescale": True, "do_normalize": True},
        **{"image_mean": list(_MEAN), "image_std": list(_STD)},
    }
    paths.write_json(folder / "preprocessor_config.json", processor)
    found: dict[str, np.ndarray] = {}
    origins = _origins(Network(config).abstract(), {})
    for path, leaf in weights.leaves(params):
        origin, value = origins[path], np.asarray(leaf)
        layers = value if origin.stacked else [value]
        for name, layer in zip(origin.names, layers, strict=True):
            found[name] = layer if origin.axes is None else layer.transpose(np.argsort(origin.axes))
    tensors = [(name, found[name].shape, "F16") for name in sorted(found)]
    weights.write(folder / "model.safetensors", tensors, found.__getitem__)


@jax.jit(static_argnums=0)
def _images(clip: CLIP, params: Any, pictures: Array) -> Array:
    return clip.images(params, pictures)


@jax.jit(static_argnums=0)
def _texts(config: CLIPConfig, params: Any, ids: Array) -> Array:
    return Network(config).bind(params).text(ids)


def _origins(target: Any, shapes: Shapes) -> dict[str, Origin]:
    found = {"logit_scale": Origin(("logit_scale",))}
    for tower in ("text_model", "vision_model"):
        within = text_clip.tower_origins(target[tower], f"{tower}.")
        found |= {f"{tower}/{path}": origin for path, origin in within.items()}
    for name in ("text_projection", "visual_projection"):
        found[name] = Origin((f"{name}.weight",), (1, 0))
    return found


def _normalisation(folder: Path, side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation. UserError where pictures are treated in another way."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _MEAN, _STD
    checksums.check(file)
    fields = read_json(file)
    if not isinstance(fields, Mapping):
        raise UserError(f"{file}: must hold the fields of a CLIPImageProcessor")
    for name, sides in (("size", ("shortest_edge", "height")), ("crop_size", ("height",))):
        given = fields.get(name, side)
        if isinstance(given, Mapping):
            given = next((given[s] for s in sides if s in given), None)
        if given != side:
            raise UserError(f"{file}: {name} must be image_size={side} of config.json, got {given}")
    for name, value in (("resample", 3), ("rescale_factor", 1 / 255)):
        given = fields.get(name, value)
        close = isinstance(given, (int, float)) and value - 1e-6 <= given <= value + 1e-6
        if not close:  # NaN is not, nor is a whole number that no float can hold
            raise UserError(f"{file}: {name} must be {value:.6g}, got {given!r}")
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if fields.get(name, True) is not True:
            raise UserError(f"{file}: {name} must be true, got {fields[name]!r}")
    found = []
    for name, usual in (("image_mean", _MEAN), ("image_std", _STD)):
        given = fields.get(name, usual)
        numbers = isinstance(given, (list, tuple)) and all(map(ranges.is_real, given))
        least = 0 if name == "image_mean" else 1e-3
        if not numbers or len(given) != 3 or not all(least <= v <= 10 for v in given):
            raise UserError(f"{file}: {name} must be three numbers, {least:g} to 10, got {given!r}")
        found.append(tuple(map(float, given)))
    return found[0], found[1]


def _digest(files: Sequence[Path]) -> str:
    """The SHA-256 of a file, or of those of several."""
    of_each = [
        blob.name
        if re.fullmatch("[0-9a-f]{64}", (blob := file.resolve()).name)
        else checksums.digest(file)
        for file in files
    ]
    if len(of_each) == 1:
        return of_each[0]
    return hashlib.sha256("".join(of_each).encode()).hexdigest()
