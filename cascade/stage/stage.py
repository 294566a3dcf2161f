"""Where networks meet mathematics: a Stage is one diffusion model of the cascade.

A base stage draws [b, s, s, 3] from text; a super-resolution stage draws it from text and a
smaller picture. Parameters are nested dicts of arrays and always arguments, so a Stage itself is
a value without state: `init` makes parameters, `loss` scores them on a batch, `denoiser` makes of
them what samplers take, `sample` draws pictures. A stage with an autoencoder diffuses in latents,
which `sample` decodes; its denoiser takes the network's parameters alone, and it has no loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cascade import images
from cascade.diffusion import denoise, grids, loss, process, samplers
from cascade.models import (
    AutoencoderConfig,
    Conditioning,
    EfficientUNetConfig,
    Network,
    UNetConfig,
    placing,
)
from cascade.published.deepfloyd.unet import IFUNetConfig
from cascade.published.x4_upscaler.unet import UpscalerUNetConfig

DenoiserConfig = UNetConfig | EfficientUNetConfig | IFUNetConfig | UpscalerUNetConfig
Schedule = (
    process.Cosine
    | process.InterpolatedCosine
    | process.LinearVP
    | process.Sigmoid
    | process.Discrete
    | process.ZeroTerminal
)
Sampler = (
    samplers.Ancestral
    | samplers.DDIM
    | samplers.DPMSolverPP2M
    | samplers.DPMSolverPP2MSDE
    | samplers.Heun
)
GuidancePlan = denoise.Constant | denoise.Interval | denoise.Oscillating | denoise.PerStep
Grid = (
    grids.Uniform
    | grids.Quadratic
    | grids.EvenLogSNR
    | grids.Karras
    | grids.OnTable
    | grids.Respaced
)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Noise conditioning augmentation of low-resolution pictures (Saharia et al. 2022, sec. 2.4).

    The picture is corrupted by the forward process at its own resolution, before upsampling, with
    the schedule's log-SNR at a level in [0, max_level]; the level is drawn per example in training
    (uniformly) and fixed in sampling, the noise drawn once a picture, and the network is told.
    after_upsampling: DeepFloyd IF enlarges the picture first, bilinearly and corner on corner
    (`images.upsample_corners`), and corrupts it at full resolution. The same level is then far
    weaker, since noise of single pixels averages out: 4x in sigma, 2.77 in log-SNR, for a factor 4.
    """

    schedule: process.Cosine | process.Discrete = field(default_factory=process.Cosine)
    max_level: float = 1.0
    after_upsampling: bool = False

    def __post_init__(self):
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"Augmentation.max_level must be in [0, 1], got {self.max_level}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn from a stage unless the caller says otherwise.

    grid: the times of the steps. guidance: weight w of classifier-free guidance; 1 means none.
    guidance_plan: how the weight changes over the steps. guidance_rescale: phi of
    `denoise.rescale`, 0 for not at all.
    aug_level: in [0, 1], of the low-resolution picture; only a super-resolution stage has one. It
    may exceed `Augmentation.max_level`, where no training was; public weights refuse that.
    """

    steps: int = 32
    grid: Grid = field(default_factory=grids.Uniform)
    guidance: float = 4.0
    guidance_plan: GuidancePlan = field(default_factory=denoise.Constant)
    guidance_rescale: float = 0.0
    sampler: Sampler = field(default_factory=samplers.DPMSolverPP2M)
    threshold: denoise.Threshold = field(default_factory=denoise.Threshold)
    aug_level: float = 0.0

    def __post_init__(self):
        try:
            self.grid.check(self.steps)
        except ValueError as e:
            raise ValueError(f"Sampling.{e}") from None
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"Sampling.guidance must be 0 or more, got {self.guidance}")
        for name in ("aug_level", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Sampling.{name} must be in [0, 1], got {getattr(self, name)}")
        plan = self.guidance_plan
        if isinstance(plan, denoise.PerStep) and len(plan.factors) != self.steps:
            raise ValueError(
                f"Sampling.guidance_plan must have a factor for each of {self.steps} steps, "
                f"got {len(plan.factors)}"
            )

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional half of the network's batch."""
        plan = self.guidance_plan
        turns = isinstance(plan, denoise.Oscillating) and plan.low != 1
        return self.guidance != 1 or turns or isinstance(plan, denoise.PerStep)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("picture", "repaint"),
    meta_fields=("strength",),
)
@dataclass(frozen=True, kw_only=True)
class Edit:
    """Pictures to begin from instead of noise alone, to be drawn anew as a whole or in part.

    picture: [b, h, w, 3] in [-1, 1], of the size that is drawn. repaint: [b, h, w, 1] bool, True
    where it is drawn anew, False where it stays as it is; None redraws all of it.
    strength: in (0, 1], the share of the steps that are taken. They are the last ones, and the
    picture is noised to where they begin: Meng et al. 2022 ("SDEdit").
    """

    # Any, since transformations also build this pytree of shapes and placeholders.
    picture: Any
    repaint: Any = None
    strength: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"Edit.strength must be in (0, 1], got {self.strength}")

    def skipped(self, steps: int) -> int:
        """How many of the steps are left out. ValueError when that is all of them."""
        taken = int(steps * self.strength)
        if taken < 1:
            raise ValueError(
                f"Edit.strength {self.strength} of {steps} steps takes none: it must be at least "
                f"1/{steps}"
            )
        return steps - taken


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a cascade: what it draws, with which network, process and objective.

    resolution, lowres_resolution: sides of the square pictures drawn and conditioned on, in pixels
    (lowres_resolution None: a base stage). prediction: what the network's output means.
    residual: in super-resolution, the network predicts what x0 adds to the upsampled low-resolution
    picture (compare Li et al. 2021, "SRDiff", which diffuses that difference itself); an untrained
    stage then draws the enlargement, not nothing. For prediction="x0".
    autoencoder: of a latent stage, whose diffusion runs in its latents; its parameters are then
    {"network": ..., "autoencoder": ...}. Such a stage is drawn from, not trained.
    variance: if the network also predicts the variance of each step, by as many output channels
    more, how that is trained. condition_dropout: share of training examples whose text is replaced
    by the null condition, the embedding of the network's null_prompt if it has one.
    """

    name: str
    resolution: int
    lowres_resolution: int | None = None
    network: DenoiserConfig
    autoencoder: AutoencoderConfig | None = None
    schedule: Schedule = field(default_factory=process.Cosine)
    prediction: process.Prediction = "v"
    residual: bool = False
    loss: loss.Loss = field(default_factory=loss.Loss)
    variance: loss.LearnedVariance | None = None
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
        if self.published and not isinstance(self.schedule, process.Discrete):
            raise ValueError(
                f"StageConfig.schedule must be Discrete with an {type(self.network).__name__}, "
                f"whose time is the entry of a table, got {self.schedule}"
            )
        if self.residual and (low is None or self.prediction != "x0"):
            raise ValueError(
                "StageConfig.residual is for super-resolution stages with prediction='x0', got "
                f"lowres_resolution={low} and prediction={self.prediction!r}"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(
                f"StageConfig.condition_dropout must be in [0, 1), got {self.condition_dropout}"
            )
        channels = self.network.in_channels * (1 if self.variance is None else 2)
        if self.network.out_channels != channels:
            learned = "without" if self.variance is None else "with"
            raise ValueError(
                f"StageConfig.network.out_channels must be {channels} {learned} learned variance, "
                f"got {self.network.out_channels}"
            )
        if self.autoencoder is not None:
            latent, factor = self.autoencoder.latent_channels, self.autoencoder.factor
            if self.network.in_channels != latent or self.resolution % factor or self.residual:
                raise ValueError(
                    f"StageConfig.autoencoder has {latent} latent channels of 1/{factor} of the "
                    "side: network.in_channels must be as many, resolution a multiple of it, and "
                    f"residual off; got {self.network.in_channels}, {self.resolution} and "
                    f"{self.residual}"
                )
        self.check(self.sampling)

    @property
    def published(self) -> bool:
        """Whether its network is a public one, which is told the entry of the table that it was
        trained on for a time, and the embedding of "" for no text."""
        return isinstance(self.network, IFUNetConfig | UpscalerUNetConfig)

    def check(self, settings: Sampling) -> None:
        """Raise ValueError for settings that make no sense for this stage."""
        if self.autoencoder is not None and settings.threshold.kind != "none":
            raise ValueError(
                f'Sampling.threshold must be "none" in {self.name}, whose latents have no range to '
                f"be kept in, got {settings.threshold.kind!r}"
            )
        if self.published and settings.aug_level > self.augmentation.max_level:
            raise ValueError(
                f"Sampling.aug_level of {self.name} must be at most {self.augmentation.max_level}, "
                f"the most that it was trained on, got {settings.aug_level}"
            )
        asked = getattr(settings.sampler, "gamma", None) == "learned"
        if asked and self.variance is None:
            raise ValueError(
                'Sampling.sampler Ancestral(gamma="learned") needs a network that has learned the '
                f"variance, which {self.name} has not: give gamma a number in [0, 1]"
            )
        # Whoever loads IF's weights had no say in what they learned, and may take a faster sampler.
        if not asked and self.variance is not None and not isinstance(self.network, IFUNetConfig):
            raise ValueError(
                f"{self.name} has learned the variance of its steps, for which Sampling.sampler "
                f'{settings.sampler} has no use: choose Ancestral(gamma="learned")'
            )
        ends_in_noise = isinstance(self.schedule, process.ZeroTerminal)
        if ends_in_noise and settings.grid(settings.steps, self.schedule)[0] < 1:
            raise ValueError(
                f"Sampling.grid {settings.grid} begins short of t=1, where a ZeroTerminal schedule "
                "has the pure noise that sampling starts from: use Uniform or another from 1 on"
            )


class Stage:
    """One diffusion model: `init`, `loss`, `denoiser` (and `sample`, which uses the last)."""

    def __init__(self, config: StageConfig):
        self.config = config
        self.network = Network(config.network)
        self.autoencoder = None if config.autoencoder is None else Network(config.autoencoder)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters, as nested dicts of arrays."""
        if self.autoencoder is None:
            return self.network.init(key)
        k_network, k_autoencoder = jax.random.split(key)
        return {
            "network": self.network.init(k_network),
            "autoencoder": self.autoencoder.init(k_autoencoder),
        }

    def abstract(self) -> dict[str, Any]:
        """The shapes of `init`'s result, without memory."""
        if self.autoencoder is None:
            return self.network.abstract()
        return {"network": self.network.abstract(), "autoencoder": self.autoencoder.abstract()}

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
        Where the network has a null_prompt, whoever embeds the text has dropped it already: only
        they know that prompt's embedding.
        part: (i, n) if it is rows i, i + n, ... of a batch n times as large: the mean of the parts'
        losses is then that batch's, dropout masks aside. ValueError for a latent stage.
        """
        config = self.config
        if config.autoencoder is not None:
            raise ValueError(f"{config.name} diffuses in latents: such a stage is not trained")
        k_drop, k_level, k_augment, k_loss, k_dropout = jax.random.split(key, 5)
        x0 = images.to_float(batch["image"])
        cond = Conditioning(text=batch["text"], text_mask=batch["text_mask"])
        rows = x0.shape[:1]
        if config.network.null_prompt is None:
            drop = functools.partial(jax.random.bernoulli, k_drop, config.condition_dropout)
            cond = cond.dropped(loss.draw(drop, rows, part))
        if config.lowres_resolution is not None:
            level = loss.draw(functools.partial(jax.random.uniform, k_level), rows, part)
            level = config.augmentation.max_level * level
            lowres = images.to_float(batch["lowres"])
            normal = functools.partial(jax.random.normal, k_augment)

            def draw(shape):
                return loss.draw(normal, (len(lowres), *shape), part)

            cond = self._with_lowres(cond, lowres, level, draw, x0.shape[1:3])

        if part is not None:
            k_dropout = jax.random.fold_in(k_dropout, part[0])

        def predict(x_t, logsnr):
            prediction, gamma = self._predict(params, x_t, logsnr, cond, k_dropout)
            return prediction if gamma is None else (prediction, gamma)

        return loss.denoising_loss(
            predict,
            x0,
            kind=config.prediction,
            schedule=config.schedule,
            loss=config.loss,
            variance=config.variance,
            key=k_loss,
            part=part,
        )

    def denoiser(
        self,
        params: Any,
        cond: Conditioning,
        *,
        guidance: denoise.Weight | Callable[[Float[Array, " b"]], Float[Array, " b"]] = 1.0,
        rescale: float = 0.0,
        threshold: denoise.Threshold,
        negative: Conditioning | None = None,
    ) -> denoise.Denoiser:
        """(x_t, logsnr) -> x0, guided in one batched pass of the network, then thresholded.

        params: the network's, without an autoencoder's.
        negative: what guidance moves away from; None means the null condition, which DeepFloyd IF
        does not have: it takes the embedding of "".
        guidance: a weight, or the weight as a function of the log-SNR; the Python number 1.0 runs
        the conditional half alone. rescale: phi of `denoise.rescale`.
        A network that has learned the variance makes it a `denoise.WithVariance`.
        """
        kind, learned = self.config.prediction, self.config.variance is not None
        plain = isinstance(guidance, (int, float)) and guidance == 1
        if negative is None and not plain and self.config.network.null_prompt is not None:
            raise ValueError(
                f'stage {self.config.name}: guidance needs `negative`, the embedding of "" unless '
                "it is a text; its network knows no other way to have no text"
            )

        def conditional(x_t, logsnr):
            prediction, gamma = self._predict(params, x_t, logsnr, cond)
            return process.to_x0(prediction, kind, x_t, logsnr), gamma

        def guided(x_t, logsnr):
            both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, negative or cond.null())
            twice = jnp.concatenate([x_t, x_t]), jnp.concatenate([logsnr, logsnr])
            prediction, gamma = self._predict(params, *twice, both)
            towards, away = jnp.split(prediction, 2)
            w = guidance(logsnr) if callable(guidance) else guidance
            mixed = denoise.guide(towards, away, w)
            if rescale > 0:
                mixed = denoise.rescale(mixed, towards, rescale)
            # Guidance is for the mean: the variance is that of the conditional half.
            gamma = None if gamma is None else gamma[: len(x_t)]
            return process.to_x0(mixed, kind, x_t, logsnr), gamma

        estimate: Any = conditional if plain else guided
        return denoise.thresholded(
            denoise.WithVariance(estimate) if learned else lambda *at: estimate(*at)[0], threshold
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
        edit: Edit | None = None,
        place: Callable[[Array, str], Array] | None = None,
    ) -> Float[Array, "b h2 w2 3"]:
        """Draw one picture in [-1, 1] for each row of `cond`, as one compiled program.

        keys: [b], one a picture; a picture depends on its own key and row alone. lowres: for a
        super-resolution stage, the smaller pictures in [-1, 1]; they are augmented once, here.
        size: side of the pictures drawn, if not the stage's resolution (crops). edit: begin from
        these pictures, whose size it is then. place: puts activations on several devices, as for
        `models.placing`, and the pictures like a "stream"; programs are kept by its hash.
        """
        self.config.check(settings)
        side = size or self.config.resolution
        shape = (side, side) if edit is None else edit.picture.shape[1:3]
        if (lowres is None) != (self.config.lowres_resolution is None):
            raise ValueError(
                f"stage {self.config.name}: lowres pictures must be given exactly when "
                f"it has a lowres_resolution ({self.config.lowres_resolution})"
            )
        # Compiled for everything but these two numbers.
        scalars = {
            "guidance": jnp.float32(settings.guidance),
            "aug_level": jnp.float32(settings.aug_level),
        }
        settings = dataclasses.replace(
            settings, guidance=0.0 if settings.guided else 1.0, aug_level=0.0
        )
        latent, inner, network = self.config.autoencoder, (*shape, 3), params
        if latent is not None:
            if edit is not None:
                raise ValueError(f"stage {self.config.name}: diffusion in latents takes no edit")
            inner = (*(side // latent.factor for side in shape), latent.latent_channels)
            network = params["network"]
        inputs = (cond, negative, lowres, edit, keys, scalars)
        with placing(place) if place else contextlib.nullcontext():
            drawn = _sample(self.config, inner, settings, place, network, *inputs)
        return drawn if latent is None else _decode(latent, params["autoencoder"], drawn)

    def _predict(self, params, x_t, logsnr, cond, key=None):
        """-> (prediction in the space of config.prediction, gamma), gamma None unless learned."""
        time = self._time(logsnr, self.config.schedule)
        prediction, gamma = self.network(params, x_t, time, cond, key), None
        if self.config.variance is not None:
            prediction, gamma = _split_variance(prediction)
        if self.config.residual:
            # alpha times a picture alpha x + sigma eps: for pixels of variance 1, the best guess
            # of x without its neighbours.
            alpha = jnp.cos(cond.lowres_time * (jnp.pi / 2000))
            prediction += alpha[:, None, None, None] * cond.lowres
        return prediction, gamma

    def _time(self, logsnr: Float[Array, " b"], schedule: Schedule) -> Float[Array, " b"]:
        """What the network is told of log-SNR, of that schedule."""
        if self.config.published and isinstance(schedule, process.Discrete):
            return schedule.entry(logsnr)
        return time_of(logsnr)

    def _with_lowres(self, cond, lowres, level, draw, size) -> Conditioning:
        """draw: shape [h, w, c] -> that much noise for each picture."""
        augmentation = self.config.augmentation
        logsnr = augmentation.schedule.logsnr(level)
        if augmentation.after_upsampling:
            lowres = images.upsample_corners(lowres, size)
            lowres = process.corrupt(lowres, draw(lowres.shape[1:]), logsnr)
        else:
            lowres = process.corrupt(lowres, draw(lowres.shape[1:]), logsnr)
            lowres = images.upsample(lowres, size)
        time = self._time(logsnr, augmentation.schedule)
        return dataclasses.replace(cond, lowres=lowres, lowres_time=time)


def time_of(logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
    """log-SNR -> what the networks embed: 0 (clean) to 1000 (noise), the time of the unshifted
    cosine schedule, whatever schedule is in use (Salimans & Ho 2022, `inv_cos`)."""
    return 1000 * (2 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -30, 30)))


def _split_variance(output: Float[Array, "b h w c2"]) -> tuple[Array, Array]:
    """Network output -> (prediction, gamma): the second half of its channels runs over [-1, 1]."""
    prediction, variance = jnp.split(output, 2, axis=-1)
    return prediction, (variance + 1) / 2


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(config, shape, settings, place, params, cond, negative, lowres, edit, keys, scalars):
    """-> [b, *shape], pictures or latents."""
    stage, b = Stage(config), keys.shape[0]
    k_noise, k_steps, k_augment = jnp.moveaxis(
        jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
    )
    if lowres is not None:
        level = jnp.broadcast_to(scalars["aug_level"], (b,))
        draw = functools.partial(samplers.initial_noise, k_augment)
        cond = stage._with_lowres(cond, lowres, level, draw, shape[:2])
        if negative is not None:
            negative = dataclasses.replace(
                negative, lowres=cond.lowres, lowres_time=cond.lowres_time
            )
    times = settings.grid(settings.steps, config.schedule)
    starts = config.schedule.logsnr(times[:-1])

    def weight(logsnr):
        return settings.guidance_plan(scalars["guidance"], logsnr, starts)

    denoiser = stage.denoiser(
        params,
        cond,
        guidance=weight if settings.guided else 1.0,
        rescale=settings.guidance_rescale,
        threshold=settings.threshold,
        negative=negative,
    )
    x, after_step = samplers.initial_noise(k_noise, shape), None
    if edit is not None:
        times = times[edit.skipped(settings.steps) :]
        x, after_step = _edited(config, edit, x, times)
    return samplers.sample(
        denoiser,
        x if place is None else place(x, "stream"),
        schedule=config.schedule,
        times=times,
        step=settings.sampler,
        keys=k_steps,
        after_step=after_step,
    )


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, latents):
    # Picture by picture: at full resolution the activations of one, not the weights, fill memory.
    autoencoder = Network(config).bind(params)
    return jax.lax.map(lambda latent: autoencoder.decode(latent[None])[0], latents)


def _edited(config, edit, noise, times):
    """(what the sampler starts from, its `after_step`): an edit's picture, and what stays of it.

    DeepFloyd IF's pipelines leave clean what stays, from the start to the end; other networks have
    never met a picture whose parts are unequally noisy, and get it as noisy as the rest (Song et
    al. 2021, "Score-Based Generative Modeling through SDEs", App. I.2).
    """
    picture, clean = edit.picture.astype(jnp.float32), isinstance(config.network, IFUNetConfig)

    def at(t):
        return jnp.broadcast_to(config.schedule.logsnr(t), picture.shape[:1])

    x = process.corrupt(picture, noise, at(times[0]))
    if edit.repaint is None:
        return x, None

    def after_step(x_s, logsnr_s, keys):
        known = picture
        if not clean:
            drawn = samplers.initial_noise(keys, picture.shape[1:])
            noised = process.corrupt(picture, drawn, logsnr_s)
            # The last step ends in pictures, of which the known part is known exactly.
            ends = (logsnr_s >= at(times[-1]))[:, None, None, None]
            known = jnp.where(ends, picture, noised)
        return jnp.where(edit.repaint, x_s, known)

    return jnp.where(edit.repaint, x, picture) if clean else x, after_step
