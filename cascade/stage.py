"""Where networks meet mathematics: a Stage is one diffusion model of the cascade.

A base stage draws [b, s, s, 3] from text; a super-resolution stage draws it from text and a
smaller picture. Parameters are nested dicts of arrays and always arguments, so a Stage itself is
a value without state: `init` makes parameters, `loss` scores them on a batch, `denoiser` makes of
them what samplers take, `sample` draws pictures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cascade import images
from cascade.diffusion import denoise, loss, process, samplers
from cascade.models import Conditioning, EfficientUNetConfig, Network, UNetConfig

Schedule = (
    process.Cosine
    | process.InterpolatedCosine
    | process.LinearVP
    | process.Sigmoid
    | process.Discrete
    | process.ZeroTerminal
)
Sampler = samplers.Ancestral | samplers.DDIM | samplers.DPMSolverPP2M | samplers.Heun


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Noise conditioning augmentation of low-resolution pictures (Saharia et al. 2022, sec. 2.4).

    The picture is corrupted by the forward process at its own resolution, before upsampling, with
    the schedule's log-SNR at a level in [0, max_level]; the level is drawn per example in training
    (uniformly) and fixed in sampling, and the network is told.
    """

    schedule: process.Cosine = field(default_factory=process.Cosine)
    max_level: float = 1.0

    def __post_init__(self):
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"Augmentation.max_level must be in [0, 1], got {self.max_level}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn from a stage unless the caller says otherwise.

    guidance: weight w of classifier-free guidance; 1 means none. aug_level: in [0, 1], of the
    low-resolution picture; only a super-resolution stage has one.
    """

    steps: int = 32
    guidance: float = 4.0
    sampler: Sampler = field(default_factory=samplers.DPMSolverPP2M)
    threshold: denoise.Threshold = field(default_factory=denoise.Threshold)
    aug_level: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Sampling.steps must be at least 1, got {self.steps}")
        if not 0 <= self.aug_level <= 1:
            raise ValueError(f"Sampling.aug_level must be in [0, 1], got {self.aug_level}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a cascade: what it draws, with which network, process and objective.

    resolution, lowres_resolution: sides of the square pictures drawn and conditioned on, in pixels
    (lowres_resolution None: a base stage). prediction: what the network's output means.
    condition_dropout: share of training examples whose text is replaced by the null condition.
    """

    name: str
    resolution: int
    lowres_resolution: int | None = None
    network: UNetConfig | EfficientUNetConfig
    schedule: Schedule = field(default_factory=process.Cosine)
    prediction: process.Prediction = "v"
    loss: loss.Loss = field(default_factory=loss.Loss)
    condition_dropout: float = 0.1
    augmentation: Augmentation = field(default_factory=Augmentation)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self):
        low = self.lowres_resolution
        if low is not None and (low < 1 or self.resolution % low):
            raise ValueError(
                f"StageConfig.resolution must be a multiple of lowres_resolution={low}, "
                f"got {self.resolution}"
            )
        if self.network.lowres != (low is not None):
            raise ValueError(
                f"StageConfig.network.lowres={self.network.lowres} contradicts "
                f"lowres_resolution={low}: super-resolution needs both, a base stage neither"
            )
        if self.prediction == "eps" and isinstance(self.schedule, process.ZeroTerminal):
            raise ValueError(
                'StageConfig.prediction must be "v" or "x0" with a ZeroTerminal schedule, got '
                '"eps": at its end the input is noise alone, and to predict that says nothing of x0'
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(
                f"StageConfig.condition_dropout must be in [0, 1), got {self.condition_dropout}"
            )


class Stage:
    """One diffusion model: `init`, `loss`, `denoiser` (and `sample`, which uses the last)."""

    def __init__(self, config: StageConfig):
        self.config = config
        self.network = Network(config.network)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters, as nested dicts of arrays."""
        return self.network.init(key)

    def abstract(self) -> dict[str, Any]:
        """The shapes of `init`'s result, without memory."""
        return self.network.abstract()

    def loss(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        part: loss.Part | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The training loss of a batch, and scalars worth logging.

        batch: image uint8 [b, s, s, 3] (any crop of the stage's resolution); for super-resolution
        lowres uint8 [b, s/f, s/f, 3], aligned with it; text f32 [b, l, d], text_mask bool [b, l].
        part: (i, n) if it is rows i, i + n, ... of a batch n times as large: the mean of the parts'
        losses is then that batch's, dropout masks aside.
        """
        config = self.config
        k_drop, k_level, k_augment, k_loss, k_dropout = jax.random.split(key, 5)
        x0 = images.to_float(batch["image"])
        cond = Conditioning(text=batch["text"], text_mask=batch["text_mask"])
        rows = x0.shape[:1]
        drop = functools.partial(jax.random.bernoulli, k_drop, config.condition_dropout)
        cond = cond.dropped(loss.draw(drop, rows, part))
        if config.lowres_resolution is not None:
            level = loss.draw(functools.partial(jax.random.uniform, k_level), rows, part)
            level = config.augmentation.max_level * level
            lowres = images.to_float(batch["lowres"])
            noise = functools.partial(jax.random.normal, k_augment)
            noise = loss.draw(noise, lowres.shape, part)
            cond = self._with_lowres(cond, lowres, level, noise, x0.shape[1:3])

        if part is not None:
            k_dropout = jax.random.fold_in(k_dropout, part[0])

        def predict(x_t, logsnr):
            return self.network(params, x_t, time_of(logsnr), cond, k_dropout)

        return loss.denoising_loss(
            predict,
            x0,
            kind=config.prediction,
            schedule=config.schedule,
            loss=config.loss,
            key=k_loss,
            part=part,
        )

    def denoiser(
        self,
        params: Any,
        cond: Conditioning,
        *,
        guidance: float | Float[Array, ""] = 1.0,
        threshold: denoise.Threshold,
        negative: Conditioning | None = None,
    ) -> denoise.Denoiser:
        """(x_t, logsnr) -> x0, guided in one batched pass of the network, then thresholded.

        negative: what guidance moves away from; None means the null condition.
        guidance: the Python number 1.0 runs the conditional half alone.
        """

        def x0_of(x_t, logsnr, cond):
            prediction = self.network(params, x_t, time_of(logsnr), cond)
            return process.to_x0(prediction, self.config.prediction, x_t, logsnr)

        def guided(x_t, logsnr):
            both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, negative or cond.null())
            x0 = x0_of(jnp.concatenate([x_t, x_t]), jnp.concatenate([logsnr, logsnr]), both)
            x0_cond, x0_uncond = jnp.split(x0, 2)
            return denoise.guide(x0_cond, x0_uncond, guidance)

        plain = isinstance(guidance, (int, float)) and guidance == 1
        return denoise.thresholded(
            functools.partial(x0_of, cond=cond) if plain else guided, threshold
        )

    def sample(
        self,
        params: Any,
        cond: Conditioning,
        keys: Key[Array, " b"],
        *,
        settings: Sampling,
        lowres: Float[Array, "b h w 3"] | None = None,
        negative: Conditioning | None = None,
        size: int | None = None,
    ) -> Float[Array, "b s s 3"]:
        """Draw one picture in [-1, 1] for each row of `cond`, as one compiled program.

        keys: [b], one a picture; a picture depends on its own key and row alone. lowres: for a
        super-resolution stage, the smaller pictures in [-1, 1]; they are augmented once, here.
        size: side of the pictures drawn, if not the stage's resolution (crops).
        """
        size = size or self.config.resolution
        if (lowres is None) != (self.config.lowres_resolution is None):
            raise ValueError(
                f"stage {self.config.name}: lowres pictures must be given exactly when "
                f"it has a lowres_resolution ({self.config.lowres_resolution})"
            )
        scalars = {
            "guidance": jnp.float32(settings.guidance),
            "aug_level": jnp.float32(settings.aug_level),
        }
        return _sample(
            self.config,
            size,
            settings.steps,
            settings.sampler,
            settings.threshold,
            settings.guidance != 1,
            params,
            cond,
            negative,
            lowres,
            keys,
            scalars,
        )

    def _with_lowres(self, cond, lowres, level, noise, size) -> Conditioning:
        logsnr = self.config.augmentation.schedule.logsnr(level)
        lowres = process.corrupt(lowres, noise, logsnr)
        return dataclasses.replace(
            cond, lowres=images.upsample(lowres, size), lowres_time=time_of(logsnr)
        )


def time_of(logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
    """log-SNR -> what the networks embed: 0 (clean) to 1000 (noise), the time of the unshifted
    cosine schedule, whatever schedule is in use (Salimans & Ho 2022, `inv_cos`)."""
    return 1000 * (2 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -30, 30)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _sample(
    config, size, steps, sampler, threshold, guided, params, cond, negative, lowres, keys, scalars
):
    stage = Stage(config)
    b, size = keys.shape[0], (size, size)
    k_noise, k_steps, k_augment = jnp.moveaxis(
        jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
    )
    if lowres is not None:
        noise = samplers.initial_noise(k_augment, lowres.shape[1:])
        level = jnp.broadcast_to(scalars["aug_level"], (b,))
        cond = stage._with_lowres(cond, lowres, level, noise, size)
        if negative is not None:
            negative = dataclasses.replace(
                negative, lowres=cond.lowres, lowres_time=cond.lowres_time
            )
    denoiser = stage.denoiser(
        params,
        cond,
        guidance=scalars["guidance"] if guided else 1.0,
        threshold=threshold,
        negative=negative,
    )
    return samplers.sample(
        denoiser,
        samplers.initial_noise(k_noise, (*size, 3)),
        schedule=config.schedule,
        times=samplers.time_grid(steps),
        step=sampler,
        keys=k_steps,
    )
