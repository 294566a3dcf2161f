"""Grids: which times a sampler of n steps visits, [n + 1] from noise (1) down to clean (0).

A denoiser is evaluated at all of them but the last. Where the steps should be short depends on the
schedule and the sampler: near the clean end for detail, near the noisy end for layout, or evenly
in log-SNR, in which high-order solvers have their error terms.

    times = Karras()(32, schedule)

Those whose first time is below 1 still start from pure noise; the trace of the picture that x_t
would hold there must be negligible.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cascade import ranges
from cascade.diffusion import process
from cascade.diffusion.process import Schedule
from cascade.diffusion.samplers import time_grid
from cascade.ranges import shown


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A function (steps, schedule) -> decreasing times [steps + 1]. Subclasses are the grids.

    The last time is 0 unless a grid says otherwise.
    """

    def check(self, steps: int) -> None:
        """Raise ValueError unless the grid can have so many steps."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")

    @property
    def of_any_length(self) -> Grid:
        """This grid, or if it has one number of steps alone, the nearest that has any."""
        return self

    def __call__(self, steps: int, schedule: Schedule) -> Float[Array, " times"]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Uniform(Grid):
    """Equal steps of time (Saharia et al. 2022, App. A).

    They begin at 1, "trailing" in the terms of Lin et al. 2023, as ZeroTerminal schedules require.
    """

    def __call__(self, steps, schedule):
        return time_grid(steps)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Grid):
    """Square roots of time in equal steps: short ones near the clean end (Song et al. 2021, DDIM,
    App. D.2)."""

    def __call__(self, steps, schedule):
        return time_grid(steps) ** 2


@dataclass(frozen=True, kw_only=True)
class EvenLogSNR(Grid):
    """Equal steps of log-SNR from `first` to `last`, then 0 (Lu et al. 2022, "DPM-Solver").

    The ends of a cosine, 20 and -20, would spend most steps where nothing happens; the defaults are
    those of Karras et al. 2022, sigma / alpha from 80 to .002.
    """

    first: float = -8.76
    """Full log-SNR at the noisiest time, below last; kept within the schedule's range."""
    last: float = 12.43
    """Full log-SNR at the last time before 0; kept within the schedule's range."""

    def __post_init__(self):
        ranges.real(self, -60, 60, "first", "last")
        if not self.first < self.last:
            raise ValueError(f"EvenLogSNR.first must be below last={self.last}, got {self.first}")

    def __call__(self, steps, schedule):
        return _with_end(jnp.linspace(*_within(schedule, self.first, self.last), steps), schedule)


@dataclass(frozen=True, kw_only=True)
class Karras(Grid):
    """sigma / alpha to the power 1 / rho in equal steps, then 0.

    Karras et al. 2022 ("EDM"), eq. 5.
    """

    first: float = 80.0
    """sigma / alpha at the noisiest time, above last; kept within the schedule's range."""
    last: float = 0.002
    """sigma / alpha at the last time before 0, above 0; kept within the schedule's range."""
    rho: float = 7.0
    """Above 0: the larger, the shorter the steps near the clean end."""

    def __post_init__(self):
        ranges.real(self, 0, 1e12, "first", "last")
        ranges.real(self, 0, 1000, "rho")
        if not 0 < self.last < self.first:
            raise ValueError(f"Karras.first must be above last={self.last} > 0, got {self.first}")
        if self.rho <= 0:
            raise ValueError(f"Karras.rho must be positive, got {self.rho}")

    def __call__(self, steps, schedule):
        ends = _within(schedule, -2 * math.log(self.first), -2 * math.log(self.last))
        first, last = (jnp.exp(-logsnr / 2) ** (1 / self.rho) for logsnr in ends)
        noise = jnp.linspace(first, last, steps) ** self.rho
        return _with_end(-2 * jnp.log(noise), schedule)


@dataclass(frozen=True, kw_only=True)
class OnTable(Grid):
    """Equal steps over the entries of a table, entry i standing at t = (i + 1) / entries, then 0.

    For networks that were trained at these times alone (`process.Discrete`). Lin et al. 2023
    ("Common Diffusion Noise Schedules and Sample Steps are Flawed"), table 2.
    """

    spacing: Literal["leading", "trailing"] = "trailing"
    """Which entries: "trailing" begins at the last one; "leading" ends at the first one, and so
    begins short of the noisiest: at 990 of 1000 in 100 steps."""
    entries: int = 1000
    """Entries of the table, and the most steps that there can be."""
    offset: int = 0
    """Added to every entry of "leading"; latent diffusion's public weights have 1."""
    ends_clean: bool = True
    """False ends at the first entry in place of 0, in a picture that keeps its noise, as the DDIM
    of those public weights does."""
    full_last_step: bool = False
    """Whether the last step is entries // steps long where the table reaches that far below the
    last entry visited, and ends there, in a picture that keeps its noise, as in diffusers' DDIM:
    "trailing" has such steps if they do not divide the entries, "leading" if the offset is as long
    as they are."""

    def __post_init__(self):
        if self.spacing not in ("leading", "trailing"):
            raise ValueError(f'OnTable.spacing: "leading" or "trailing", got {self.spacing!r}')
        ranges.whole(self, 1, process.MOST_ENTRIES, "entries")
        if self.offset < 0 or (self.offset and self.spacing == "trailing"):
            raise ValueError(
                f'OnTable.offset must be 0, or more with spacing="leading", got {self.offset}'
            )

    def check(self, steps):
        if not 1 <= steps <= self.entries:
            raise ValueError(f"steps must be in 1..{self.entries}, the grid's entries; got {steps}")
        if (first := (steps - 1) * (self.entries // steps) + self.offset) >= self.entries:
            raise ValueError(
                f"{steps} steps with offset={self.offset} begin at entry {first}, beyond the "
                f"grid's {self.entries}: take fewer"
            )

    def __call__(self, steps, schedule):
        self.check(steps)
        if self.spacing == "leading":
            chosen = np.arange(steps)[::-1] * (self.entries // steps) + self.offset
        else:
            # Where a step ends half-way between two entries, the rounding of this sum decides.
            ends = np.arange(self.entries, 0, -self.entries / steps)[:steps]
            chosen = np.rint(ends).astype(int) - 1
        end = chosen[-1] - self.entries // steps if self.full_last_step else -1
        if end < 0:
            end = -1 if self.ends_clean else 0
        return at_entries(chosen, self.entries).at[-1].set((end + 1) / self.entries)


@dataclass(frozen=True, kw_only=True)
class Chosen(Grid):
    """These entries of a table of 1000, entry i standing at t = (i + 1) / 1000, then 0: what
    diffusers takes as `timesteps`."""

    chosen: tuple[int, ...]
    """Falling from 999 or less to 0 or more."""

    def __post_init__(self):
        falls = all(a > b for a, b in itertools.pairwise(self.chosen))
        whole = all(type(entry) is int and 0 <= entry <= 999 for entry in self.chosen)
        if not self.chosen or not whole or not falls:
            raise ValueError(f"Chosen.chosen must fall within 999..0, got {shown(self.chosen)}")

    @property
    def of_any_length(self) -> Grid:
        return OnTable()

    def check(self, steps):
        if steps != len(self.chosen):
            raise ValueError(f"steps must be as many as chosen, {len(self.chosen)}, got {steps}")

    def __call__(self, steps, schedule):
        self.check(steps)
        return at_entries(np.array(self.chosen), 1000)


BY_WORD: dict[str, Grid] = {
    "uniform": Uniform(),
    "quadratic": Quadratic(),
    "logsnr": EvenLogSNR(),
    "karras": Karras(),
    "trailing": OnTable(),
    "leading": OnTable(spacing="leading"),
}
"""What the command line calls the grids that fit any number of steps."""


def at_entries(chosen: np.ndarray, entries: int) -> Float[Array, " times"]:
    """The times of these entries of a table of so many, and 0 after them."""
    return jnp.asarray(np.append((chosen + 1) / entries, 0.0), jnp.float32)


def _within(schedule: Schedule, first: float, last: float) -> tuple[Array, Array]:
    """The two log-SNRs, kept within the schedule's range."""
    noisiest, cleanest = schedule.logsnr(jnp.array([1.0, 0.0]))
    return jnp.maximum(first, noisiest), jnp.minimum(last, cleanest)


def _with_end(logsnr: Float[Array, " n"], schedule: Schedule) -> Float[Array, " times"]:
    """The times at which the schedule has these log-SNRs, by bisection, and 0 after them."""

    def halve(_, ends):
        clean, noise = ends
        middle = (clean + noise) / 2
        noisier = schedule.logsnr(middle) < logsnr
        return jnp.where(noisier, clean, middle), jnp.where(noisier, middle, noise)

    ends = (jnp.zeros_like(logsnr), jnp.ones_like(logsnr))
    times = jax.lax.fori_loop(0, 40, halve, ends)[1]
    return jnp.append(times, 0.0)
