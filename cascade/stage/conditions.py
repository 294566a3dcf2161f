"""What a stage is told besides the noisy picture and its time.

A condition is a value that a stage lists. It says what it takes of a training batch, with its
dropout and augmentation; what of a prompt or of the smaller picture when a picture is drawn; what
stands for nothing being told; and it builds the small module that turns all that into the signals
of a network (`cascade.models.signals`). The module's parameters lie beside the network's, under the
condition's name. Text and LowRes are the first two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade import images, ranges
from cascade.diffusion import loss, process, samplers
from cascade.models.network import NetworkConfig
from cascade.models.signals import PooledText, Signals, TimeEmbedding, Widths
from cascade.stage.space import Space


class Keys(NamedTuple):
    """Random keys of one training step. All conditions of a stage share them: what is dropped is
    dropped together."""

    drop: Key[Array, ""]
    level: Key[Array, ""]
    noise: Key[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Subclasses are the conditions; their fields are settings.

    Below, a value is what the condition has made of its input: a tuple (or NamedTuple) of arrays
    [b, ...], with which the module that `build` returns is called to get Signals.
    """

    name: ClassVar[str]
    """Names its value and its parameters; no two conditions of a stage share one."""

    def check(self, space: Space, prediction: process.Prediction) -> None:
        """Raise ValueError unless a stage of that space and prediction can have the condition."""

    def widths(self, network: NetworkConfig) -> Widths:
        """How much of each kind of signal the network is told."""
        raise NotImplementedError

    def build(self, network: NetworkConfig, *, rngs: nnx.Rngs) -> Any:
        """The module: called with a value's arrays, it returns Signals."""
        raise NotImplementedError

    def shapes(self, space: Space, b: int, tokens: int, crop: int | None) -> dict[str, Any]:
        """What `of_batch` takes of a batch of b examples, as ShapeDtypeStructs.

        tokens: of each text. crop: side in pixels of what is trained on, None for all of it.
        """
        return {}

    def of_batch(
        self,
        batch: Mapping[str, Any],
        keys: Keys,
        part: loss.Part | None,
        shape: tuple[int, ...],
    ) -> tuple[Any, ...]:
        """The value for training. part: see `loss.draw`. shape: of one x0."""
        raise NotImplementedError

    def of_prompts(
        self, prompts: Sequence[str], embed: Callable[[Sequence[str]], Any]
    ) -> tuple[Any, ...] | None:
        """What is drawn from of the prompts, a row each; None where it is no matter of prompts.

        embed: the text encoder of the stage: texts -> an object with `values` and `mask`.
        """
        return None

    def away(
        self, negative: Sequence[str] | None, embed: Callable[[Sequence[str]], Any]
    ) -> tuple[Any, ...] | None:
        """What guidance moves away from, a row for each of those texts, or one; None where that is
        `null`."""
        return None

    def of_lowres(self, lowres: Float[Array, "b h w 3"]) -> tuple[Any, ...] | None:
        """What is drawn from of the smaller picture, in [-1, 1]; None where that is no matter."""
        return None

    def of_steering(self, steering: Any, b: int, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
        """What is drawn from of what steers the run, a Steering or None, where nothing else tells:
        b rows for an x0 of this shape. None where that is no matter."""
        return None

    def of_examples(self, batch: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """What is drawn from of the examples of a training batch, without dropout or noise; None
        where they say nothing of it, and super-resolution then has no previews."""
        return None

    def drawn(
        self,
        given: tuple[Any, ...],
        keys: Key[Array, " b"],
        shape: tuple[int, ...],
        level: Float[Array, " b"],
    ) -> tuple[Any, ...]:
        """What `of_prompts` or `of_lowres` gave -> the value; within the compiled program.

        keys: one a picture. shape: of one x0. level: of augmentation.
        """
        return given

    def null(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        """The value when this is not told: what classifier-free guidance moves away from."""
        return value

    def guess(self, value: tuple[Any, ...]) -> Array | None:
        """A first guess of x0 to which the network's prediction is added; None for none."""
        return None

    def where(self, value: tuple[Any, ...]) -> Array | None:
        """Where errors count in training, 1 and elsewhere 0, of a shape that broadcasts with x0's;
        None is everywhere."""
        return None


class TextInput(NamedTuple):
    """tokens [b, l, d] float32 embeddings, mask [b, l] bool, False on padding."""

    tokens: Any
    mask: Any


@dataclass(frozen=True, kw_only=True)
class Text(Condition):
    """The embeddings of a text encoder, told as tokens and pooled into a vector (Saharia et al.
    2022, sec. 2.1)."""

    name: ClassVar[str] = "text"

    width: int
    """Width of a token as the text encoder gives it."""
    context_width: int | None = None
    """Width of tokens as the attention layers get them, by one projection for all (DeepFloyd IF,
    GLIDE's token embeddings); None is `width`, without a projection."""
    head_width: int = 64
    """Channels of a head of the attention that pools the text."""
    dropout: float = 0.1
    """Share of training examples whose text is replaced by the null condition, in [0, 1)."""
    null_prompt: str | None = None
    """The prompt whose embedding stands for no text. None: no text is tokens of zero, masked,
    beside which the stage has a learned null token."""

    def __post_init__(self):
        for name in ("width", "head_width", "context_width"):
            if getattr(self, name) is not None:
                ranges.whole(self, 1, ranges.MOST_CHANNELS, name)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Text.dropout must be in [0, 1), got {self.dropout}")

    def check_encoder(self, width: int, name: str, stage: str) -> None:
        """Raise ValueError unless embeddings of that width are what the stage is told.

        name: of the text encoder, stage: of the stage, for the message.
        """
        if width != self.width:
            raise ValueError(
                f"text encoder {name}: its embeddings are {width} wide, and stage {stage} takes "
                f"{self.width} (its Text.width)"
            )

    def widths(self, network: NetworkConfig) -> Widths:
        if network.embedding_width % self.head_width:
            raise ValueError(
                f"Text.head_width={self.head_width} (attention heads) must divide the network's "
                f"embedding_width, {network.embedding_width}"
            )
        return Widths(tokens=self.context_width or self.width)

    def build(self, network: NetworkConfig, *, rngs: nnx.Rngs) -> PooledText:
        return PooledText(
            self.width,
            network.embedding_width,
            head_width=self.head_width,
            context_width=self.context_width,
            rngs=rngs,
        )

    def shapes(self, space, b, tokens, crop):
        return {
            "text": jax.ShapeDtypeStruct((b, tokens, self.width), jnp.float32),
            "text_mask": jax.ShapeDtypeStruct((b, tokens), jnp.bool_),
        }

    def of_batch(self, batch, keys, part, shape):
        """batch: text f32 [b, l, d], text_mask bool [b, l]. Where there is a null_prompt, whoever
        embeds the text has dropped it already: only they know that prompt's embedding."""
        value = self.of_examples(batch)
        if self.null_prompt is not None:
            return value
        drop = functools.partial(jax.random.bernoulli, keys.drop, self.dropout)
        keep = ~loss.draw(drop, batch["text"].shape[:1], part)[:, None]
        return TextInput(jnp.where(keep[:, :, None], value.tokens, 0), value.mask & keep)

    def of_examples(self, batch):
        return TextInput(batch["text"], batch["text_mask"])

    def of_prompts(self, prompts, embed):
        text = embed(prompts)
        return TextInput(text.values, text.mask)

    def away(self, negative, embed):
        if negative is not None:
            return self.of_prompts(negative, embed)
        return None if self.null_prompt is None else self.of_prompts([self.null_prompt], embed)

    def null(self, value):
        if self.null_prompt is not None:
            raise ValueError(
                f'guidance needs `negative`, the embedding of "{self.null_prompt}" unless it is '
                "another text's; this stage knows no other way to have no text"
            )
        return TextInput(jnp.zeros_like(value[0]), jnp.zeros_like(value[1]))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Noise conditioning augmentation of low-resolution pictures (Saharia et al. 2022, sec. 2.4).

    The picture is corrupted by the forward process at its own resolution, before upsampling, with
    the schedule's log-SNR at a level in [0, max_level]; the level is drawn per example in training
    (uniformly) and fixed in sampling, the noise drawn once a picture, and the network is told.
    """

    schedule: process.Schedule = field(default_factory=process.Cosine)
    """Whose log-SNR a level stands for."""
    max_level: float = 1.0
    """The highest level of training, in [0, 1]."""
    after_upsampling: bool = False
    """DeepFloyd IF enlarges the picture first, bilinearly and corner on corner
    (`images.upsample_corners`), and corrupts it at full resolution. The same level is then far
    weaker, since noise of single pixels averages out: 4x in sigma, 2.77 in log-SNR, for a factor 4.
    """

    def __post_init__(self):
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"Augmentation.max_level must be in [0, 1], got {self.max_level}")


class LowResInput(NamedTuple):
    """picture [b, h, w, 3] in [-1, 1], enlarged to the sides of x and corrupted; logsnr [b], how
    far it is corrupted."""

    picture: Any
    logsnr: Any


@dataclass(frozen=True, kw_only=True)
class LowRes(Condition):
    """A smaller picture of the same thing, augmented: what makes a stage super-resolution."""

    name: ClassVar[str] = "lowres"

    resolution: int
    """Side in pixels of the smaller picture, of which the stage's is a multiple."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """The noise on it."""
    residual: bool = False
    """The network predicts what x0 adds to the enlarged picture (compare Li et al. 2021, "SRDiff",
    which diffuses that difference itself); an untrained stage then draws the enlargement, not
    nothing. For prediction="x0"."""

    def check(self, space, prediction):
        if self.resolution < 1 or space.resolution % self.resolution:
            raise ValueError(
                f"LowRes.resolution must divide the stage's {space.resolution} px, "
                f"got {self.resolution}"
            )
        if self.residual and prediction != "x0":
            raise ValueError(f'LowRes.residual is for prediction="x0", got {prediction!r}')
        if self.residual and space.shape()[-1] != 3:
            raise ValueError(
                f"LowRes.residual adds to a picture, which x0 in {type(space).__name__} is not"
            )

    def widths(self, network: NetworkConfig) -> Widths:
        return Widths(channels=3)

    def build(self, network: NetworkConfig, *, rngs: nnx.Rngs) -> Any:
        return _LowresSignals(network, rngs)

    def shapes(self, space, b, tokens, crop):
        low = (crop or space.resolution) * self.resolution // space.resolution
        return {"lowres": jax.ShapeDtypeStruct((b, low, low, 3), jnp.uint8)}

    def of_batch(self, batch, keys, part, shape):
        """batch: lowres uint8 [b, s/f, s/f, 3], aligned with the picture."""
        lowres = images.to_float(batch["lowres"])
        uniform = functools.partial(jax.random.uniform, keys.level)
        level = self.augmentation.max_level * loss.draw(uniform, lowres.shape[:1], part)
        normal = functools.partial(jax.random.normal, keys.noise)
        return self._augmented(
            lowres, level, lambda shape: loss.draw(normal, (len(lowres), *shape), part), shape[:2]
        )

    def of_examples(self, batch):
        return self.of_lowres(images.to_float(batch["lowres"]))

    def of_lowres(self, lowres):
        return (lowres,)

    def drawn(self, given, keys, shape, level):
        noise = functools.partial(samplers.initial_noise, keys)
        return self._augmented(given[0], level, noise, shape[:2])

    def guess(self, value):
        if not self.residual:
            return None
        # alpha times a picture alpha x + sigma eps: for pixels of variance 1, the best guess of x
        # without its neighbours.
        alpha = jnp.cos(time_of(value[1]) * (jnp.pi / 2000))
        return alpha[:, None, None, None] * value[0]

    def _augmented(self, lowres, level, draw, size) -> LowResInput:
        """draw: shape [h, w, c] -> that much noise for each picture."""
        logsnr = self.augmentation.schedule.logsnr(level)
        if self.augmentation.after_upsampling:
            lowres = images.upsample_corners(lowres, size)
            lowres = process.corrupt(lowres, draw(lowres.shape[1:]), logsnr)
        else:
            lowres = process.corrupt(lowres, draw(lowres.shape[1:]), logsnr)
            lowres = images.upsample(lowres, size)
        return LowResInput(lowres, logsnr)


class _LowresSignals(nnx.Module):
    """The picture as channels, and its log-SNR embedded as a second time."""

    def __init__(self, network: NetworkConfig, rngs: nnx.Rngs):
        self.time = TimeEmbedding(network.time_width, network.embedding_width, rngs)

    def __call__(self, picture: Float[Array, "b h w 3"], logsnr: Float[Array, " b"]) -> Signals:
        return Signals(channels=(picture,), vectors=(self.time(time_of(logsnr)),))


def time_of(logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
    """log-SNR -> what our networks embed: 0 (clean) to 1000 (noise), the time of the unshifted
    cosine schedule, whatever schedule is in use (Salimans & Ho 2022, `inv_cos`)."""
    return 1000 * (2 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -30, 30)))
