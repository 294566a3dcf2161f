"""The Gaussian process: x_t = alpha x0 + sigma eps, with time measured by its log-SNR.

    (1)  q(x_t | x0) = N(alpha_t x0, sigma_t^2 I),   alpha_t^2 + sigma_t^2 = 1
    (2)  logsnr(t) = log(alpha_t^2 / sigma_t^2),     alpha = sqrt(sigmoid(logsnr)),
                                                     sigma = sqrt(sigmoid(-logsnr))
    (3)  v = alpha eps - sigma x0
    (4)  x0 = (x_t - sigma eps) / alpha = alpha x_t - sigma v
    (5)  eps = (x_t - alpha x0) / sigma = sigma x_t + alpha v
    (6)  v = (alpha x_t - x0) / sigma

t runs over [0, 1]: 0 is clean, 1 is noise. logsnr is the FULL log-SNR of Kingma et al. 2021
("Variational Diffusion Models"); DPM-Solver writes lambda for half of it, and the VDM code writes
gamma for its negative. Everything here is float32, whatever dtype comes in.

Sources: Ho et al. 2020 ("Denoising Diffusion Probabilistic Models"); Kingma et al. 2021;
Salimans & Ho 2022 ("Progressive Distillation for Fast Sampling of Diffusion Models") for v.

The schedules: Cosine (which can be shifted for the resolution), InterpolatedCosine, LinearVP,
Sigmoid, Discrete (a table of DDPM's), and ZeroTerminal, which makes any of them end in pure noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cascade import ranges

MOST_ENTRIES = 100_000
"""A table of discrete times has at most so many entries."""
Prediction = Literal["eps", "x0", "v"]
"""What a network predicts: the noise, the clean example, or v of equation (3)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How log-SNR falls with time. Subclasses are the schedules; the fields are their settings."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether x_t at t=1 is noise alone, with no trace of the picture."""
        return False

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        """t in [0, 1], 0 clean and 1 noise -> full log-SNR, strictly decreasing in t."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2) up to the ends, where log-SNR meets exactly logsnr_max and logsnr_min.

    The range stays [logsnr_min, logsnr_max] whatever the shift. Nichol & Dhariwal 2021 for the
    cosine (they add an offset of .008 where we truncate, like Salimans & Ho 2022); Hoogeboom et al.
    2023 ("simple diffusion") for the shift.
    """

    logsnr_min: float = -20.0
    """Full log-SNR at t=1, below logsnr_max."""
    logsnr_max: float = 20.0
    """Full log-SNR at t=0."""
    shift: float = 0.0
    """Added to log-SNR to compensate for resolution: `resolution_shift(256)` is -2.77, so that 4x4
    pixel averages of a 256 px image are as noisy as the pixels of a 64 px one."""

    def __post_init__(self):
        ranges.real(self, -60, 60, "logsnr_min", "logsnr_max", "shift")
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(
                "Cosine.logsnr_min must be below Cosine.logsnr_max, "
                f"got {self.logsnr_min} and {self.logsnr_max}"
            )

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        """-2 log tan(angle) + shift, the angle linear in t between the two ends."""
        from_clean = math.atan(math.exp((self.shift - self.logsnr_max) / 2))
        from_noise = math.atan(math.exp((self.logsnr_min - self.shift) / 2))
        span = math.pi / 2 - from_clean - from_noise
        t = t.astype(jnp.float32)
        # tan(angle) as sin / sin: both angles are small at their own end, whereas one angle near
        # pi/2 has lost 1e-7 in float32, which is 5e-3 in log-SNR at -20.
        to_clean = jnp.log(jnp.sin(from_clean + span * t))
        to_noise = jnp.log(jnp.sin(from_noise + span * (1 - t)))
        return 2 * (to_noise - to_clean) + self.shift


@dataclass(frozen=True, kw_only=True)
class InterpolatedCosine(Schedule):
    """A cosine whose shift goes from shift_clean at t=0 to shift_noise at t=1.

    logsnr = (1 - t) Cosine(shift=shift_clean) + t Cosine(shift=shift_noise). Shifting the whole
    schedule noises fine detail away almost at once; here the noisy end alone has the level of a
    large picture. Hoogeboom et al. 2023 ("simple diffusion", sec. 3.1).
    """

    logsnr_min: float = -20.0
    """Full log-SNR at t=1, below logsnr_max."""
    logsnr_max: float = 20.0
    """Full log-SNR at t=0."""
    shift_clean: float
    """The shift at t=0, as Cosine's; at 512 px theirs is resolution_shift(512, reference=32)."""
    shift_noise: float
    """The shift at t=1, at most 6 above shift_clean; at 512 px theirs is
    resolution_shift(512, reference=256)."""

    def __post_init__(self):
        ranges.real(self, -60, 60, "shift_clean", "shift_noise")
        Cosine(logsnr_min=self.logsnr_min, logsnr_max=self.logsnr_max)
        # A cosine falls by 2 pi a unit of time where it is flattest; the change of shift must not
        # undo that. The ends of the range take a little of it: 6 is safe for usual ones.
        if self.shift_noise - self.shift_clean > 6:
            raise ValueError(
                "InterpolatedCosine.shift_noise must be at most 6 above shift_clean, or log-SNR "
                f"would rise with time; got {self.shift_noise} and {self.shift_clean}"
            )

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        t = t.astype(jnp.float32)
        low, high = self.logsnr_min, self.logsnr_max
        clean = Cosine(logsnr_min=low, logsnr_max=high, shift=self.shift_clean).logsnr(t)
        noise = Cosine(logsnr_min=low, logsnr_max=high, shift=self.shift_noise).logsnr(t)
        return (1 - t) * clean + t * noise


@dataclass(frozen=True, kw_only=True)
class LinearVP(Schedule):
    """The variance-preserving process whose rate beta grows linearly in t.

    log alpha^2 = -beta_min t - (beta_max - beta_min) t^2 / 2. The defaults are the continuous limit
    of 1000 steps with betas 1e-4 to .02 (Ho et al. 2020; Song et al. 2021, "Score-Based Generative
    Modeling through SDEs", App. C). log-SNR is clipped to [-20, 20]: at t=0 it would be infinite,
    and up to t=1e-7 above 20. It ends at -10.05.
    """

    beta_min: float = 0.1
    """The rate -d log(alpha^2) / dt at t=0, above 0."""
    beta_max: float = 20.0
    """The rate at t=1, beta_min or more."""

    def __post_init__(self):
        ranges.real(self, 0, 1000, "beta_min", "beta_max")
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                "LinearVP needs 0 < beta_min <= beta_max, "
                f"got beta_min={self.beta_min}, beta_max={self.beta_max}"
            )

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        """-log(alpha^-2 - 1), by expm1: alpha^2 rounds to 1 in float32 long before t=0."""
        t = t.astype(jnp.float32)
        minus_log_alpha2 = self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2
        return -jnp.log(jnp.clip(jnp.expm1(minus_log_alpha2), math.exp(-20), math.exp(20)))


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Schedule):
    """alpha^2 falls with time along the logistic function between `start` and `end`.

    alpha^2 = (S(end) - S(u)) / (S(end) - S(start)), S(u) = 1 / (1 + exp(-u / tau)),
    u = start + t (end - start). log-SNR is clipped to [-20, 20], which it leaves at the two ends
    alone. Jabri et al. 2022 ("Scalable Adaptive Computation for Iterative Generation"); Chen 2023
    ("On the Importance of Noise Scheduling").
    """

    start: float = -3.0
    """u at t=0, below end."""
    end: float = 3.0
    """u at t=1."""
    tau: float = 0.9
    """The temperature, above 0: a smaller one is steeper in the middle."""

    def __post_init__(self):
        ranges.real(self, -1000, 1000, "start", "end")
        ranges.real(self, 0, 1000, "tau")
        if not self.start < self.end:
            raise ValueError(f"Sigmoid.start must be below end={self.end}, got {self.start}")
        if self.tau <= 0:
            raise ValueError(f"Sigmoid.tau must be positive, got {self.tau}")

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        """By S(a) - S(b) = sinh((a - b) / 2 tau) / (2 cosh(a / 2 tau) cosh(b / 2 tau)).

        The quotient alpha^2 / sigma^2 then holds no difference of nearly equal numbers.
        """
        t = t.astype(jnp.float32)
        half = (self.end - self.start) / (2 * self.tau)
        ends = math.cosh(self.start / (2 * self.tau)) / math.cosh(self.end / (2 * self.tau))
        logsnr = jnp.log(jnp.sinh(half * (1 - t))) - jnp.log(jnp.sinh(half * t)) + math.log(ends)
        return jnp.clip(logsnr, -20.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class Discrete(Schedule):
    """The table of a model trained at `steps` discrete times: entry i stands at t = (i+1) / steps.

    Between entries log-SNR is linear; at t=0, which no entry has, it is 20. Use it for weights
    trained on such a table; LinearVP and Cosine are what the tables sample.
    """

    betas: Literal["linear", "scaled linear", "cosine"] = "cosine"
    """How the betas rise: "linear" from `first` to `last` (Ho et al. 2020); "scaled linear", their
    roots linear (Rombach et al. 2022, as published with the paper); or "cosine", from
    alpha^2 = cos^2(pi/2 (t + .008) / 1.008) and at most .999 (Nichol & Dhariwal 2021)."""
    steps: int = 1000
    """Entries of the table, 2 to 100,000."""
    first: float = 1e-4
    """beta of the cleanest entry, in (0, last]; "cosine" does not read it."""
    last: float = 0.02
    """beta of the noisiest entry, below 1; "cosine" does not read it."""

    def __post_init__(self):
        if self.betas not in ("linear", "scaled linear", "cosine"):
            raise ValueError(
                f'Discrete.betas: "linear", "scaled linear" or "cosine", got {self.betas!r}'
            )
        ranges.real(self, 0, 1, "first", "last")
        if not 0 < self.first <= self.last < 1:
            raise ValueError(
                f"Discrete.first must be in (0, last={self.last}], and last below 1, "
                f"got {self.first}"
            )
        ranges.whole(self, 2, MOST_ENTRIES, "steps")

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        return jnp.interp(
            t.astype(jnp.float32) * self.steps, np.arange(self.steps + 1.0), self._table()
        )

    def entry(self, logsnr: Float[Array, " *b"]) -> Float[Array, " *b"]:
        """log-SNR -> the nearest entry of the table, 0..steps - 1: the time that a network trained
        on it is told."""
        table = self._table()
        t = jnp.interp(-logsnr.astype(jnp.float32), -table, np.arange(self.steps + 1.0))
        return jnp.clip(jnp.round(t) - 1, 0, self.steps - 1)

    def _table(self) -> np.ndarray:
        """log-SNR at t = 0, 1 / steps, ... 1, computed in float64."""
        if self.betas == "linear":
            betas = np.linspace(self.first, self.last, self.steps)
        elif self.betas == "scaled linear":
            betas = np.linspace(self.first**0.5, self.last**0.5, self.steps) ** 2
        else:
            alpha2 = np.cos((np.linspace(0, 1, self.steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - alpha2[1:] / alpha2[:-1], 0.999)
        log_alpha2 = np.cumsum(np.log1p(-betas))
        return np.concatenate([[20.0], log_alpha2 - np.log(-np.expm1(log_alpha2))])


@dataclass(frozen=True, kw_only=True)
class ZeroTerminal(Schedule):
    """`schedule`, with its alpha shifted and scaled to end at 0 and begin where it did.

        alpha <- (alpha - alpha(1)) alpha(0) / (alpha(0) - alpha(1))

    Most schedules leave a trace of the picture at t=1, from which a network learns the mean
    brightness that sampling, starting from pure noise, then lacks. log-SNR ends at -60, where x_t
    is eps to the last bit. A network's eps holds nothing about x0 there: predict v or x0.
    Lin et al. 2023 ("Common Diffusion Noise Schedules and Sample Steps are Flawed"), alg. 1.
    """

    schedule: Schedule
    """The schedule that leaves a trace of the picture at t=1."""

    @property
    def ends_in_noise(self) -> bool:
        return True

    def logsnr(self, t: Float[Array, " *b"]) -> Float[Array, " *b"]:
        alpha, sigma = alpha_sigma(self.schedule.logsnr(t))
        (first, last), (sigma_first, _) = alpha_sigma(self.schedule.logsnr(jnp.array([0.0, 1.0])))
        # sigma from the differences of the old sigma: 1 - alpha^2 is 0 in float32 near t=0.
        lost = (sigma**2 - sigma_first**2) / ((first + alpha) * (first - last))
        sigma2 = sigma_first**2 + first**2 * lost * (2 - lost)
        kept = jnp.maximum((alpha - last) / (first - last), math.exp(-30.0))
        return jnp.clip(2 * jnp.log(first * kept) - jnp.log(sigma2), -60.0)


def resolution_shift(resolution: int, reference: int = 64) -> float:
    """2 log(reference / resolution): the log-SNR shift of Hoogeboom et al. 2023, sec. 3.1.

    Both are sides in pixels. Negative (noisier) above the reference resolution.
    """
    return 2 * math.log(reference / resolution)


def alpha_sigma(logsnr: Float[Array, " *b"]) -> tuple[Float[Array, " *b"], Float[Array, " *b"]]:
    """log-SNR -> (alpha, sigma) of equation (2), each with full relative precision at +-20."""
    logsnr = logsnr.astype(jnp.float32)
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def corrupt(
    x0: Float[Array, " b *d"], eps: Float[Array, " b *d"], logsnr: Float[Array, " b"]
) -> Float[Array, " b *d"]:
    """x_t = alpha x0 + sigma eps, with eps ~ N(0, 1) drawn by the caller. Equation (1)."""
    alpha, sigma = alpha_sigma(expand(logsnr, x0))
    return alpha * x0 + sigma * eps


def noised_on(
    x: Float[Array, " b *d"],
    eps: Float[Array, " b *d"],
    logsnr: Float[Array, " b"],
    onto: Float[Array, " b"],
) -> Float[Array, " b *d"]:
    """x at a log-SNR -> x at a smaller one, by the forward process from the one to the other.

        x_t = (alpha_t / alpha_s) x_s + sigma_t sqrt(1 - exp(logsnr_t - logsnr_s)) eps

    eps ~ N(0, 1) is drawn by the caller. Kingma et al. 2021 ("Variational Diffusion Models"),
    eq. 3.
    """
    alpha_s, _ = alpha_sigma(expand(logsnr, x))
    alpha_t, sigma_t = alpha_sigma(expand(onto, x))
    added = jnp.sqrt(-jnp.expm1(expand(onto - logsnr, x)))
    return (alpha_t / alpha_s) * x + sigma_t * added * eps


def to_x0(
    prediction: Float[Array, " b *d"],
    kind: Prediction,
    x_t: Float[Array, " b *d"],
    logsnr: Float[Array, " b"],
) -> Float[Array, " b *d"]:
    """What a network predicted at x_t -> the x0 it implies. Equation (4).

    Exact algebra, but from "eps" it multiplies the network's error by 1/SNR^.5, 22000 at log-SNR
    -20: sample such networks with thresholding. "v" and "x0" are well conditioned everywhere.
    """
    prediction = prediction.astype(jnp.float32)
    alpha, sigma = alpha_sigma(expand(logsnr, x_t))
    match kind:
        case "x0":
            return prediction
        case "eps":
            return (x_t - sigma * prediction) / alpha
        case "v":
            return alpha * x_t - sigma * prediction
    raise ValueError(f'prediction must be "eps", "x0" or "v", got {kind!r}')


def from_x0(
    x0: Float[Array, " b *d"],
    kind: Prediction,
    x_t: Float[Array, " b *d"],
    logsnr: Float[Array, " b"],
) -> Float[Array, " b *d"]:
    """x0 estimated at x_t -> the same estimate as eps, x0 or v. Equations (5) and (6).

    Inverse of `to_x0`. "eps" and "v" multiply the error of x0 by SNR^.5, 22000 at log-SNR +20.
    """
    x0 = x0.astype(jnp.float32)
    alpha, sigma = alpha_sigma(expand(logsnr, x_t))
    match kind:
        case "x0":
            return x0
        case "eps":
            return (x_t - alpha * x0) / sigma
        case "v":
            return (alpha * x_t - x0) / sigma
    raise ValueError(f'prediction must be "eps", "x0" or "v", got {kind!r}')


def eps_from_x0(
    x_t: Float[Array, " b *d"], x0: Float[Array, " b *d"], logsnr: Float[Array, " b"]
) -> Float[Array, " b *d"]:
    """The noise that, with x0, makes x_t. After x0 was clipped, eps must come from here anew."""
    return from_x0(x0, "eps", x_t, logsnr)


def expand(per_example: Float[Array, " b"], x: Float[Array, " b *d"]) -> Float[Array, " b *ones"]:
    """[b] -> [b, 1, ..., 1] with the rank of x, so that it multiplies example by example."""
    return per_example.reshape(per_example.shape + (1,) * (x.ndim - 1))
