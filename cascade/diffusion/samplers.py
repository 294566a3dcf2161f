"""Samplers: from noise to data along a grid of times, and by DDIM back again.

Each step goes from x_t to a less noisy x_s through x0_hat, which a denoiser gives at x_t, and

    (1)  eps_hat = (x_t - alpha_t x0_hat) / sigma_t
    (2)  x_s = alpha_s x0_hat + sigma_s eps_hat

Because eps_hat comes from x0_hat as the denoiser returned it, guided and thresholded, the two
always explain x_t between them; eps as the network predicted it would not, where a threshold has
changed x0_hat (DDIM can be told to take it nonetheless). The steps differ in what they add to (2):
noise (Ancestral, DDIM), or a correction from a second x0_hat, an earlier one (DPMSolverPP2M and its
SDE variant) or one at x_s (Heun).

    x_T = initial_noise(keys, (64, 64, 3))
    x0 = sample(denoiser, x_T, schedule=Cosine(), times=time_grid(32), step=DDIM(), keys=keys)

Every image has a key of its own, and its noise depends on that key and the index of the step alone:
an image is the same whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from cascade import ranges
from cascade.diffusion.denoise import Denoiser, estimate_of
from cascade.diffusion.process import Schedule, alpha_sigma, eps_from_x0, expand, noised_on

AfterStep = Callable[
    [Float[Array, " b *d"], Float[Array, " b"], Key[Array, " b"]], Float[Array, " b *d"]
]
"""(x_s, logsnr_s, keys) -> x_s, called after every step; the keys are fresh ones of each image."""

Memory = Any
"""What a step keeps for the next one: a pytree of arrays, of the same structure at every step."""


def sample(
    denoiser: Denoiser,
    x: Float[Array, " b *d"],
    *,
    schedule: Schedule,
    times: Float[Array, " times"],
    step: Step,
    keys: Key[Array, " b"],
    after_step: AfterStep | None = None,
    rises: bool = False,
) -> Float[Array, " b *d"]:
    """Carry x from times[0] to times[-1] in n steps; returns the x0_hat of the last one, or x at
    times[-1] if that is above 0.

    x: `initial_noise` for times[0] = 1, or an image corrupted to the log-SNR of times[0] to start
        from (SDEdit, Meng et al. 2022).
    times: [n + 1], ending at 0, or above it to keep that much noise; see `time_grid`. Decreasing,
        unless `rises`.
    keys: one for each image, from jax.random.key; deterministic steps leave them alone.
    after_step: changes x after every step, the last included (log-SNR is then that of times[-1]).
    rises: times may also rise; x is then noised on to the later time by the forward process, and
        the denoiser is not asked (`again`).

    One loop: tracing cost does not grow with n. The caller compiles it, denoiser and all, with
    jax.jit.
    """
    run = {"schedule": schedule, "times": times, "step": step, "keys": keys}
    every = (0, times.shape[0] - 1)
    return walk(denoiser, begun(x, step), every, **run, after_step=after_step, rises=rises).x


class Run(NamedTuple):
    """A sampling run under way: what its next step takes, and what the last one thought."""

    x: Float[Array, " b *d"]
    """At the time that the next step starts from; after the last one the sample."""
    x0_hat: Float[Array, " b *d"]
    """What the denoiser thought x0 was at the last step; zeros before the first."""
    memory: Memory
    """What that step keeps for the next one."""


def begun(x: Float[Array, " b *d"], step: Step) -> Run:
    """A run that has x and has taken no step."""
    x = x.astype(jnp.float32)
    return Run(x, jnp.zeros_like(x), step.memory(x))


def walk(
    denoiser: Denoiser,
    run: Run,
    steps: tuple[Any, Any],
    *,
    schedule: Schedule,
    times: Float[Array, " times"],
    step: Step,
    keys: Key[Array, " b"],
    after_step: AfterStep | None = None,
    rises: bool = False,
) -> Run:
    """Carry a run on by some of the steps of `sample`, which takes them all.

    steps: (i, j) takes steps i, ..., j - 1 of those that `times` has; i and j may be traced, so
    that one compiled program takes any of them.
    """
    if keys.shape != run.x.shape[:1]:
        raise ValueError(
            f"sample: keys must be one for each image, [{len(run.x)}] from jax.random.key (not "
            f"PRNGKey); got shape {keys.shape}"
        )
    logsnr = _grid(schedule, times, run.x)

    def body(i, run):
        k_step, k_after = _split(_fold_in(keys, i + 1))  # 0 is the initial noise
        last = times[i + 1] <= 0
        leg = Leg(logsnr[i], logsnr[i + 1], last, k_step)
        x_s, x0_hat, memory = step(denoiser, run.x, leg, run.memory)
        x_s = jnp.where(last, x0_hat, x_s)
        if after_step is not None:
            x_s = after_step(x_s, leg.logsnr_s, k_after)
        return Run(x_s, x0_hat, memory)

    def noised(i, run):
        drawn = _normal(_fold_in(keys, i + 1), run.x.shape[1:])
        x = noised_on(run.x, drawn, logsnr[i], logsnr[i + 1])
        return Run(x, run.x0_hat, step.memory(x))

    def body_or_noised(i, run):
        return jax.lax.cond(times[i + 1] > times[i], noised, body, i, run)

    return jax.lax.fori_loop(*steps, body_or_noised if rises else body, run)


def again(
    times: Float[Array, " times"], repeats: int, length: int | None = None
) -> Float[Array, " more"]:
    """The grid with each `length` of its steps walked `repeats` times, for `sample(rises=True)`.

    After those steps x is noised back to where they began, and takes them again. length: None is
    the whole grid, which is how SDEdit repeats (Meng et al. 2022, alg. 1, K); a few steps at a time
    are RePaint's jumps (Lugmayr et al. 2022, alg. 1, with its jumps of more than a step: length is
    their j, repeats their r). With n steps, n `repeats` are taken, and some rises between them.
    """
    n = times.shape[0] - 1
    length = n if length is None else length
    if repeats < 1 or not 1 <= length <= n:
        raise ValueError(
            f"again: repeats must be at least 1 and length in 1..{n}, got {repeats} and {length}"
        )
    order = [0]
    for first in range(0, n, length):
        part = range(first, min(first + length, n) + 1)
        order += [*part[1:], *(repeats - 1) * list(part)]
    return times[jnp.array(order)]


def time_grid(steps: int, start: float = 1.0) -> Float[Array, " times"]:
    """`steps` equal steps of time from `start` down to 0: [steps + 1]. 1 is noise, 0 is clean.

    start below 1 is for an x corrupted to that time.
    """
    if steps < 1:
        raise ValueError(f"time_grid: steps must be at least 1, got {steps}")
    if not 0 < start <= 1:
        raise ValueError(f"time_grid: start must be in (0, 1], got {start}")
    return jnp.linspace(start, 0.0, steps + 1)


def initial_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, " b *d"]:
    """N(0, 1) of the given shape for each key: [b, *shape]. Not the noise of any step."""
    return _normal(_fold_in(keys, 0), shape)


def invert_ddim(
    denoiser: Denoiser,
    x0: Float[Array, " b *d"],
    *,
    schedule: Schedule,
    times: Float[Array, " times"],
) -> Float[Array, " b *d"]:
    """Walk the grid of `sample` backwards: x0 -> the x at times[0] that DDIM(eta=0) takes to x0.

    Reconstruction is exact to first order in the step, with the same denoiser and the same times;
    strong guidance degrades it. Song et al. 2021 ("Denoising Diffusion Implicit Models"), sec. 4.3;
    Dhariwal & Nichol 2021, App. F.
    """
    logsnr = _grid(schedule, times, x0)[::-1]

    def body(x_t, leg):
        logsnr_t, logsnr_s = leg
        # The denoiser sees x_t with the noise level of x_s, where the step being undone saw x_s.
        # At its own level, log-SNR 20 to begin with, (1) would blow its error up 22000 times.
        eps = eps_from_x0(x_t, denoiser(x_t, logsnr_s), logsnr_s)
        alpha_t, sigma_t = alpha_sigma(expand(logsnr_t, x_t))
        alpha_s, sigma_s = alpha_sigma(expand(logsnr_s, x_t))
        return alpha_s * ((x_t - sigma_t * eps) / alpha_t) + sigma_s * eps, None

    return jax.lax.scan(body, x0.astype(jnp.float32), (logsnr[:-1], logsnr[1:]))[0]


class Leg(NamedTuple):
    """One step of the grid, from t to the less noisy s."""

    logsnr_t: Float[Array, " b"]
    logsnr_s: Float[Array, " b"]
    last: Bool[Array, ""]  # x_s will not be used: `sample` returns x0_hat, times ending at 0
    keys: Key[Array, " b"]  # for the noise of this step


@dataclass(frozen=True, kw_only=True)
class Step:
    """How to get from x_t to x_s. Subclasses are the samplers; the fields are their settings."""

    @property
    def needs_variance(self) -> bool:
        """Whether the step asks its denoiser for a variance, as Detailed ones may have."""
        return False

    def memory(self, x: Float[Array, " b *d"]) -> Memory:
        """What the first step finds in place of its predecessor's memory."""
        return ()

    def __call__(
        self, denoiser: Denoiser, x_t: Float[Array, " b *d"], leg: Leg, memory: Memory
    ) -> tuple[Float[Array, " b *d"], Float[Array, " b *d"], Memory]:
        """-> (x_s, x0_hat at x_t as the denoiser gave it, memory for the next step)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ancestral(Step):
    """The posterior's mean, and noise between the two variances of Ho et al. 2020.

        x_s = r (alpha_s / alpha_t) x_t + (1 - r) alpha_s x0_hat + sqrt(1 - r) S noise
        r = exp(logsnr_t - logsnr_s),   S = sigma_s^(1 - gamma) sigma_t^gamma

    Imagen uses this sampler, and does not state its gamma. Saharia et al. 2022, App. A;
    Nichol & Dhariwal 2021 ("Improved DDPM"), eq. 15. A run that ends at time 0 ends in x0_hat;
    diffusers adds S noise to that, unless the last step starts from the table's first entry.
    """

    gamma: float | Literal["learned"] = 0.3
    """In [0, 1]: 0 is the posterior variance given x0 (the least; exact for a single point), 1 that
    of the forward process (the most; exact for data of unit variance), .3 the choice of Video
    Diffusion Models (Ho et al. 2022). "learned" takes it, for every coordinate, from the denoiser
    (`denoise.Estimate`)."""

    def __post_init__(self):
        if self.gamma != "learned" and not (
            isinstance(self.gamma, int | float) and 0 <= self.gamma <= 1
        ):
            raise ValueError(f'Ancestral.gamma must be in [0, 1], or "learned"; got {self.gamma}')

    @property
    def needs_variance(self) -> bool:
        return self.gamma == "learned"

    def __call__(self, denoiser, x_t, leg, memory):
        alpha_t, sigma_t = alpha_sigma(expand(leg.logsnr_t, x_t))
        alpha_s, sigma_s = alpha_sigma(expand(leg.logsnr_s, x_t))
        x0_hat, _, gamma = estimate_of(denoiser, x_t, leg.logsnr_t)
        if self.gamma != "learned":
            gamma = self.gamma
        elif gamma is None:
            raise ValueError('Ancestral(gamma="learned") needs a variance; the denoiser has none')
        r, rest = _share_kept(leg, x_t)
        mean = r * (alpha_s / alpha_t) * x_t + rest * alpha_s * x0_hat
        deviation = jnp.sqrt(rest) * sigma_s ** (1 - gamma) * sigma_t**gamma
        return mean + deviation * _normal(leg.keys, x_t.shape[1:]), x0_hat, memory


@dataclass(frozen=True, kw_only=True)
class DDIM(Step):
    """Equation (2) with a part eta of the posterior's noise in place of eps_hat.

        x_s = alpha_s x0_hat + sigma_s (sqrt(1 - c) eps_hat + sqrt(c) noise)
        c = eta^2 (1 - exp(logsnr_t - logsnr_s))

    Song et al. 2021 ("Denoising Diffusion Implicit Models"), eq. 12 and 16, where c sigma_s^2 is
    sigma_t^2. What to do where x0_hat is thresholded, they do not say.
    """

    eta: float = 0.0
    """In [0, 1]: 0 is deterministic, a first-order solver of the probability flow; 1 is
    Ancestral(gamma=0)."""
    eps: Literal["rederived", "predicted"] = "rederived"
    """Where eps_hat comes from, if x0_hat is thresholded: "rederived" by (1) from that x0_hat, or
    "predicted", by (1) from x0_hat as it was before, which is what the network said. The latter is
    the default of diffusers, where the former is called use_clipped_model_output."""

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM.eta must be in [0, 1], got {self.eta}")
        if self.eps not in ("rederived", "predicted"):
            raise ValueError(f'DDIM.eps must be "rederived" or "predicted", got {self.eps!r}')

    def __call__(self, denoiser, x_t, leg, memory):
        alpha_s, sigma_s = alpha_sigma(expand(leg.logsnr_s, x_t))
        x0_hat, free, _ = estimate_of(denoiser, x_t, leg.logsnr_t)
        explained = free if self.eps == "predicted" else x0_hat
        noise = eps_from_x0(x_t, explained, leg.logsnr_t)
        if self.eta > 0:
            c = self.eta**2 * _share_kept(leg, x_t)[1]
            noise = jnp.sqrt(1 - c) * noise + jnp.sqrt(c) * _normal(leg.keys, x_t.shape[1:])
        return alpha_s * x0_hat + sigma_s * noise, x0_hat, memory


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Step):
    """DPM-Solver++(2M): second order for one evaluation a step, by the previous x0_hat.

        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) D
        D = x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)

    h is the step in HALF the log-SNR. The first step, without a past, and the last, which returns
    x0_hat, are of first order. D may leave [-1, 1] when both x0_hat are thresholded; the picture
    returned does not. Lu et al. 2022 ("DPM-Solver++"), alg. 2.
    """

    def memory(self, x):
        # An infinitely long previous step: h / (2 h_prev) is 0, so the first step is first order.
        return jnp.zeros_like(x), jnp.full(x.shape[:1], -jnp.inf, jnp.float32)

    def __call__(self, denoiser, x_t, leg, memory):
        _, sigma_t = alpha_sigma(expand(leg.logsnr_t, x_t))
        alpha_s, sigma_s = alpha_sigma(expand(leg.logsnr_s, x_t))
        x0_hat = denoiser(x_t, leg.logsnr_t)
        h, extrapolated = self._extrapolated(x0_hat, leg, memory)
        x_s = (sigma_s / sigma_t) * x_t - alpha_s * jnp.expm1(-h) * extrapolated
        return x_s, x0_hat, (x0_hat, leg.logsnr_t)

    def _extrapolated(self, x0_hat, leg, memory):
        """-> (h, D)."""
        x0_prev, logsnr_prev = memory
        # The ratio of steps is that of log-SNRs, halved or not.
        h, h_prev = leg.logsnr_s - leg.logsnr_t, leg.logsnr_t - logsnr_prev
        d = x0_hat + expand(h / (2 * h_prev), x0_hat) * (x0_hat - x0_prev)
        return expand(h / 2, x0_hat), d


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2MSDE(DPMSolverPP2M):
    """DPM-Solver++(2M) for the stochastic equation: the same D, and fresh noise at every step.

        x_s = (sigma_s / sigma_t) exp(-h) x_t + alpha_s (1 - exp(-2h)) D
              + sigma_s sqrt(1 - exp(-2h)) noise

    With x0_hat for D it is Ancestral(gamma=0). Noise wears earlier errors away, so that it draws
    better than 2M in many steps and worse in few. Lu et al. 2022 ("DPM-Solver++"), sec. 5.
    """

    def __call__(self, denoiser, x_t, leg, memory):
        _, sigma_t = alpha_sigma(expand(leg.logsnr_t, x_t))
        alpha_s, sigma_s = alpha_sigma(expand(leg.logsnr_s, x_t))
        x0_hat = denoiser(x_t, leg.logsnr_t)
        h, extrapolated = self._extrapolated(x0_hat, leg, memory)
        rest = -jnp.expm1(-2 * h)
        x_s = (sigma_s / sigma_t) * jnp.exp(-h) * x_t + alpha_s * rest * extrapolated
        x_s += sigma_s * jnp.sqrt(rest) * _normal(leg.keys, x_t.shape[1:])
        return x_s, x0_hat, (x0_hat, leg.logsnr_t)


@dataclass(frozen=True, kw_only=True)
class Heun(Step):
    """Second order by two evaluations a step, one in the last: 2n - 1 in all.

    The step (2) is taken, x0_hat' evaluated at its end, and the trapezoid rule applied to the slope
    of the probability flow in the angle phi = atan(sigma / alpha), along which dx/dphi = v
    (Salimans & Ho 2022, App. D); in the frame that turns with x0_hat and eps_hat this comes to

        x_s = (2) + (phi_t - phi_s) / (2 sigma_s) (x0_hat' - x0_hat)

    Karras et al. 2022 ("EDM", alg. 1) apply the rule in x / alpha over sigma / alpha, which has
    sin(phi_t - phi_s) alpha_s / alpha_t for phi_t - phi_s: the same for short steps, but it fails
    where alpha_t vanishes. The first of 16 cosine steps takes sigma / alpha from 22026 to 10, and
    on Gaussian data of deviation .5 to 1 their rule ends 1 to 8 off, this one .005. Their churn
    (alg. 2) noises x_t on before the step.
    """

    slope: Literal["angle", "noise"] = "angle"
    """In which variable the trapezoid rule is applied: "angle", or "noise" as published, and as in
    diffusers' HeunDiscreteScheduler."""
    churn: float = 0.0
    """x_t is first noised on to sigma / alpha times 1 + churn, their S_churn / N; in
    [0, sqrt(2) - 1]."""
    churn_within: tuple[float, float] = (0.05, 50.0)
    """Least and largest sigma / alpha that are churned, in rising order from 0 or more."""
    churn_noise: float = 1.003
    """Factor on the deviation of the noise that churning adds, to make up for what denoisers lose;
    their value for ImageNet (table 5)."""

    def __post_init__(self):
        if self.slope not in ("angle", "noise"):
            raise ValueError(f'Heun.slope: "angle" or "noise", got {self.slope!r}')
        ranges.real(self, 0, 1e3, "churn_noise")
        if not 0 <= self.churn <= 2**0.5 - 1:
            raise ValueError(f"Heun.churn must be in [0, sqrt(2) - 1], got {self.churn}")
        if not 0 <= self.churn_within[0] < self.churn_within[1] < math.inf:
            raise ValueError(f"Heun.churn_within must rise from 0 or more, got {self.churn_within}")

    def __call__(self, denoiser, x_t, leg, memory):
        logsnr_t = leg.logsnr_t
        if self.churn > 0:
            x_t, logsnr_t = self._churned(x_t, leg)
        alpha_t, sigma_t = alpha_sigma(expand(logsnr_t, x_t))
        alpha_s, sigma_s = alpha_sigma(expand(leg.logsnr_s, x_t))
        x0_hat = denoiser(x_t, logsnr_t)
        x_s = alpha_s * x0_hat + sigma_s * eps_from_x0(x_t, x0_hat, logsnr_t)
        turn = jnp.arctan2(sigma_t, alpha_t) - jnp.arctan2(sigma_s, alpha_s)
        if self.slope == "noise":
            turn = jnp.sin(turn) * alpha_s / alpha_t

        def corrected(x_s):
            return x_s + turn / (2 * sigma_s) * (denoiser(x_s, leg.logsnr_s) - x0_hat)

        return jax.lax.cond(leg.last, lambda x_s: x_s, corrected, x_s), x0_hat, memory

    def _churned(self, x_t, leg):
        """-> x at sigma / alpha times 1 + churn, and its log-SNR."""
        noise = jnp.exp(-leg.logsnr_t / 2)
        low, high = self.churn_within
        grow = jnp.where((low <= noise) & (noise <= high), 1 + self.churn, 1.0)
        logsnr = leg.logsnr_t - 2 * jnp.log(grow)
        kept = alpha_sigma(logsnr)[0] / alpha_sigma(leg.logsnr_t)[0]
        added = alpha_sigma(logsnr)[0] * noise * jnp.sqrt(grow**2 - 1) * self.churn_noise
        drawn = _normal(leg.keys, x_t.shape[1:])
        return expand(kept, x_t) * x_t + expand(added, x_t) * drawn, logsnr


BY_WORD: dict[str, tuple[Step, str | None]] = {
    "ancestral": (Ancestral(), "gamma"),
    "ddim": (DDIM(), "eta"),
    "ddim-predicted": (DDIM(eps="predicted"), "eta"),
    "dpm++": (DPMSolverPP2M(), None),
    "dpm++sde": (DPMSolverPP2MSDE(), None),
    "heun": (Heun(), "churn"),
    "heun-noise": (Heun(slope="noise"), "churn"),
}
"""What the command line calls the samplers, each with the field that a number behind it sets."""


def _grid(
    schedule: Schedule, times: Float[Array, " times"], x: Float[Array, " b *d"]
) -> Float[Array, "times b"]:
    """The log-SNR of every time, for every example."""
    return jnp.broadcast_to(schedule.logsnr(times)[:, None], (times.shape[0], x.shape[0]))


def _share_kept(leg: Leg, x: Float[Array, " b *d"]) -> tuple[Array, Array]:
    """r = exp(logsnr_t - logsnr_s) and 1 - r, the latter without cancellation for short steps."""
    difference = expand(leg.logsnr_t - leg.logsnr_s, x)
    return jnp.exp(difference), -jnp.expm1(difference)


def _fold_in(keys: Key[Array, " b"], data: Any) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _split(keys: Key[Array, " b"]) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, " b *d"]:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
