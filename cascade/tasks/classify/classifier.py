"""A small network that reads attributes off a noised picture: p(c | x_t).

It is the downsampling half of a U-Net (Dhariwal & Nichol 2021, sec. 4.1), whose parameters are
called as the U-Net's are, so that it can begin with those of the denoiser that it is to guide. What
is looked for is looked for at each place of the coarsest level, and counts where it is seen best.
Attributes are independent of one another:

    log p(c | x_t) = sum over c of log sigmoid(prior_c + g(alpha) f_c(x_t))

g(alpha) = alpha / sqrt(alpha^2 + 0.01) is all but 1 wherever there is something to be seen, and
falls with alpha where there is nothing, as the gradient of the true log p(c | x_t) does. Guidance
divides the gradient by alpha: without the gate, what f has left of an error in pure noise would be
multiplied by up to 22000. The width of the gate is our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from cascade import config, ranges
from cascade.diffusion.process import alpha_sigma
from cascade.errors import UserError
from cascade.models import Network, Signals, UNetConfig, Widths
from cascade.models.blocks import context_of, network_input
from cascade.models.layers import Conv, GroupNorm, Linear, coordinates
from cascade.models.signals import TimeEmbedding
from cascade.models.unet import EncoderLevel
from cascade.stage.conditions import time_of
from cascade.storage import checksums, paths
from cascade.storage.weights import load_safetensors, save_safetensors

SHIPPED = Path(__file__).parents[2] / "pretrained" / "classify" / "attributes64"
"""The folder of the classifier that comes with the package."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What a classifier tells of pictures of which size, and how large it is."""

    attributes: tuple[str, ...]
    """What it tells of: each a word or some, in small letters; see `labels`."""
    resolution: int
    """Side of its pictures in pixels."""
    network: UNetConfig
    """The U-Net of which it is the downsampling half."""
    features: int = 256
    """What is looked for at each place of the last level."""

    def __post_init__(self):
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "resolution", "features")
        self.network.check_sides(self.resolution, self.resolution)
        if self.network.in_channels != 3:
            raise ValueError(
                "ClassifierConfig.network.in_channels must be the 3 of a picture, got "
                f"{self.network.in_channels}"
            )
        for name in self.attributes:
            if not name or name != " ".join(name.lower().replace(",", " ").split()):
                raise ValueError(
                    "ClassifierConfig.attributes must be words in small letters with a space "
                    f"between them and no comma, got {name!r}"
                )
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError("ClassifierConfig.attributes must be one or more, no two alike")

    def build(self, *, rngs: nnx.Rngs) -> Classifier:
        """The network, with fresh parameters."""
        return Classifier(self, rngs)


class Classifier(nnx.Module):
    """Call with x_t [b, s, s, 3] and its log-SNR [b]; returns logits [b, attributes].

    Before training every attribute has the same probability, whatever the picture.
    """

    def __init__(self, config: ClassifierConfig, rngs: nnx.Rngs):
        network, told = config.network, Widths()
        levels = network.levels
        self.config = config
        self.time = TimeEmbedding(network.time_width, network.embedding_width, rngs)
        pixels, _ = network.pixel_channels(told)
        self.conv_in = Conv(pixels + 2 * network.coordinates, levels[0].width, rngs=rngs)
        self.encoder = nnx.List(
            EncoderLevel(network, told, level, outer, level is not levels[-1], rngs)
            for level, outer in zip(levels, levels[:1] + levels, strict=False)
        )
        self.norm = GroupNorm(levels[-1].width)
        self.features = Linear(levels[-1].width, config.features, rngs=rngs)
        self.out = Linear(config.features, len(config.attributes), zero=True, rngs=rngs)
        self.prior = nnx.Param(jnp.full(len(config.attributes), -2.0))

    def __call__(
        self, x_t: Float[Array, "b s s 3"], logsnr: Float[Array, " b"]
    ) -> Float[Array, "b n"]:
        network = self.config.network
        pixels = network_input(network, Widths(), x_t, Signals())
        if network.coordinates:
            pixels = jnp.concatenate([pixels, coordinates(pixels)], axis=-1)
        context = context_of(self.time, time_of(logsnr), Signals())
        h = self.conv_in(pixels)
        for level in self.encoder:
            h, _ = level(h, context, None)
        h = self.features(self.norm(h.astype(jnp.float32), activate=True))
        seen = self.out(jax.nn.silu(jnp.max(h, axis=(1, 2))))
        alpha, _ = alpha_sigma(logsnr)
        gate = alpha / jnp.sqrt(alpha**2 + 0.01)
        return self.prior[...] + gate[:, None] * seen


def labels(
    attributes: Sequence[str], captions: Sequence[str]
) -> dict[str, Bool[np.ndarray, "b n"]]:
    """{"labels": which attribute each caption states}: its words stand there, in order, together.

    "red circle" is stated by "a small red circle", "red" too, and not by "a redder circle".
    """
    spaced = [f" {' '.join(''.join(_letters(c)).split())} " for c in captions]
    stated = [[f" {name} " in caption for name in attributes] for caption in spaced]
    return {"labels": np.array(stated, bool).reshape(len(captions), len(attributes))}


def _letters(caption: str) -> Any:
    # A mark of punctuation parts words: "a circle, red" states no "circle red".
    return (c if c.isalnum() or c in " -'" else " | " for c in caption.lower())


def save(folder: paths.Path, config_: ClassifierConfig, params: Any) -> None:
    """Write a folder that `load` reads: config.json, model.safetensors (float16), SHA256SUMS."""
    paths.make_folder(folder)
    paths.write_json(folder / "config.json", config.to_json(config_))
    save_safetensors(folder / "model.safetensors", params, dtype="float16")
    checksums.write_each(folder)


def load(name_or_dir: str | Path | None = None) -> tuple[ClassifierConfig, Any]:
    """(config, parameters) of a folder that a run of ClassifierTraining ended in.

    None is the one that ships. Raises UserError for what is missing or damaged.
    """
    folder = paths.path(SHIPPED if name_or_dir is None else name_or_dir)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"classifier {folder}: holds no config.json; train one (cascade train "
            "configs/classify/attributes64.py --workdir RUN) and give RUN/classifier"
        )
    checksums.check(file)
    found = config.from_json(ClassifierConfig, config.read_json(file), str(file))
    checksums.check(folder / "model.safetensors")
    params = load_safetensors(folder / "model.safetensors", Network(found).abstract())
    return found, jax.tree.map(jnp.asarray, params)
