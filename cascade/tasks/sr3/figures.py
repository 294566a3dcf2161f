"""What `cascade eval sr3` measures: enlarged pictures beside the true ones, and schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cascade import images
from cascade.data.transforms import block_means
from cascade.devices.terminal import bar
from cascade.diffusion.grids import Grid, Karras
from cascade.errors import UserError
from cascade.evaluation.claims import Property, above
from cascade.evaluation.quality import (
    bicubic,
    features,
    frechet_distance,
    gradient_energy,
    psnr,
)
from cascade.runner.cascade import Cascade
from cascade.scenes.words import dataset
from cascade.stage import LowRes, Sampling, Stage

Pictures = UInt8[np.ndarray, "n s s 3"]
SETS = 2
"""Sets of pictures; claims are about both."""
AT_ONCE = 16
SHOWN = 8
"""Rows of the sheet."""


def lowres_of(model: Cascade) -> LowRes:
    """What the last stage of a model enlarges; UserError for one that does not, or reads text."""
    conditions = model.stages[-1][0].config.conditions
    if len(conditions) != 1 or not isinstance(conditions[0], LowRes):
        raise UserError(
            f"model {model.name}: its last stage must be told a smaller picture and nothing else; "
            "train one with configs/sr3/sr64.py"
        )
    return conditions[0]


def check_alike(model: Cascade, regression: Cascade) -> None:
    """Raise UserError unless the last stages of both enlarge pictures of one size to one size."""
    small, large = lowres_of(model).resolution, model.stages[-1][0].config.resolution
    other = lowres_of(regression).resolution, regression.stages[-1][0].config.resolution
    if (small, large) != other:
        raise UserError(
            f"--regression {regression.name}: must enlarge as {model.name} does, from {small} px "
            f"to {large}, and goes from {other[0]} to {other[1]}; train one of the same stage"
        )


def pictures(model: Cascade, data: str, count: int) -> tuple[Pictures, Pictures]:
    """(SETS * count pictures to measure, as many others to choose schedules by) of a dataset."""
    lowres_of(model)
    source = dataset(data).open(model.stages[-1][0].config.resolution)
    wanted = 2 * SETS * count
    if len(source) < wanted:
        raise UserError(f"--data {data}: holds {len(source)} pictures, and {wanted} are needed")
    apart = min(len(source) // wanted, 1000)
    every = np.stack([source[i * apart]["image"] for i in range(wanted)])
    return every[::2], every[1::2]


def small(model: Cascade, true: Pictures) -> UInt8[np.ndarray, "n r r 3"]:
    """The small pictures that a model enlarges: means over blocks."""
    factor = true.shape[1] // lowres_of(model).resolution
    return np.stack([block_means(picture, factor) for picture in true])


def draw(model: Cascade, true: Pictures, seed: int, settings: Sampling, desc: str) -> Pictures:
    """The true pictures made small, and enlarged by the last stage."""
    stage, params = model.stages[-1]
    lowres, drawn = small(model, true), []
    with bar(total=len(true), unit="picture", desc=desc) as shown:
        for first in range(0, len(true), AT_ONCE):
            rows = np.minimum(np.arange(first, first + AT_ONCE), len(true) - 1)
            given = {LowRes.name: (jnp.asarray(images.to_float(lowres[rows])),)}
            keys = jax.vmap(jax.random.key)(seed + jnp.asarray(rows))
            made = Stage(stage.config).sample(params, given, keys, settings=settings)
            drawn += list(images.to_uint8(made)[: len(true) - first])
            shown.update(min(AT_ONCE, len(true) - first))
    return np.stack(drawn)


def enlarged(
    ways: Mapping[str, Cascade], true: Pictures, seed: int
) -> tuple[dict[str, Any], dict[str, Pictures]]:
    """({"figures", "claims"} as JSON values, the pictures drawn by each way and bicubically).

    PSNR in dB. Sharpness: the ratio of gradient energy to the true pictures', 1 is right;
    less than 1 counts as 1, or a flat picture would have none.
    Consistency: the root mean squared difference, in levels, of what is drawn, made small again,
    from the small picture. FD-proxy as `evaluation.quality` has it.
    """
    side = true.shape[1]
    (first, *_) = ways.values()
    lowres, real = small(first, true), features(true)
    drawn = {
        name: draw(model, true, seed, model.stages[-1][0].config.sampling, desc=name)
        for name, model in ways.items()
    }
    drawn["bicubic"] = np.stack([bicubic(picture, side) for picture in lowres])
    near, sharp, found = {}, {}, {}
    for name, made in drawn.items():
        near[name] = _by_set([psnr(a, b) for a, b in zip(made, true, strict=True)])
        sharp[name] = _by_set(
            [
                max(1.0, gradient_energy(a)) / max(1.0, gradient_energy(b))
                for a, b in zip(made, true, strict=True)
            ]
        )
        again = small(first, made).astype(np.float64)
        found[name] = {
            "psnr_db": round(float(near[name].mean()), 2),
            "sharpness": round(float(sharp[name].mean()), 3),
            "fd_proxy": round(frechet_distance(features(made), real), 4),
            "consistency": round(float(((again - lowres) ** 2).mean() ** 0.5), 2),
        }
    report: dict[str, Any] = {"figures": found}
    if "regression" in ways:
        off = {name: abs(np.log(v)) for name, v in sharp.items()}
        report["claims"] = {
            "psnr": Property(
                title="the regression is nearer to the true picture",
                unit="PSNR in dB",
                how=f"{len(true)} pictures of {side} px from {lowres.shape[1]} px",
                figures={name: near[name] for name in ways},
                claims=[above("regression above SR3", near["regression"], near["SR3"])],
            ).as_json(),
            "sharpness": Property(
                title="SR3 is as sharp as the true picture, more nearly than the regression",
                unit="how far the logarithm of the ratio of gradient energies is from 0",
                how="the same pictures",
                figures={name: off[name] for name in ways},
                claims=[above("regression above SR3", off["regression"], off["SR3"])],
            ).as_json(),
        }
    return report, drawn


def searched(
    model: Cascade, others: Pictures, true: Pictures, tries: int, steps: int, seed: int, plot: Any
) -> dict[str, Any]:
    """The best of some random schedules of so many steps, and what it is worth on other pictures.

    SR3 chooses the noise levels of few steps by the Fréchet distance, after training (sec. 2.4). A
    schedule is a `Karras` grid, whose ends and curvature are drawn at random; the FD-proxy to the
    pictures `others` chooses one, which is then measured on `true` beside the stage's own grid.
    """
    settings = model.stages[-1][0].config.sampling
    rng = np.random.default_rng(seed)

    def distance(grid: Grid, on: Pictures, desc: str) -> float:
        chosen = dataclasses.replace(settings, steps=steps, grid=grid)
        return frechet_distance(features(draw(model, on, seed, chosen, desc)), features(on))

    found = []
    for i in range(tries):
        grid = Karras(
            first=round(float(np.exp(rng.uniform(np.log(2), np.log(100)))), 3),
            last=round(float(np.exp(rng.uniform(np.log(0.01), np.log(0.3)))), 4),
            rho=round(float(rng.uniform(1, 9)), 2),
        )
        found.append((distance(grid, others, f"schedule {i + 1} of {tries}"), grid))
    best = min(found, key=lambda one: one[0])[1]
    report = {
        "steps": steps,
        "tries": tries,
        "best": {"first": best.first, "last": best.last, "rho": best.rho},
        "fd_proxy": {
            "own grid": round(distance(settings.grid, true, "own grid"), 4),
            "best": round(distance(best, true, "best schedule"), 4),
        },
    }
    _plot(plot, found, distance(settings.grid, others, "own grid"))
    return report


def sheet(path: Any, model: Cascade, true: Pictures, drawn: Mapping[str, Pictures]) -> None:
    """Write a PNG of some pictures: columns of the small one, each way, and the true one."""
    side, columns = true.shape[1], []
    rows = np.linspace(0, len(true) - 1, SHOWN).astype(int)
    factor = side // lowres_of(model).resolution
    blocks = small(model, true[rows]).repeat(factor, 1).repeat(factor, 2)
    named = {"small": blocks, **{name: made[rows] for name, made in drawn.items()}}
    named["true"] = true[rows]
    for made in named.values():
        columns.append(images.grid([p.repeat(2, 0).repeat(2, 1) for p in made], 1))
    images.save_png(path, images.grid(images.captioned(columns, list(named)), len(named)))


def _by_set(values: list[float]) -> Float[np.ndarray, "sets n"]:
    # A flat picture that is drawn exactly has no finite PSNR. Sets take turns, for neighbours in a
    # dataset are alike.
    return np.minimum(np.asarray(values), 99.0).reshape(-1, SETS).T


def _plot(path: Any, found: list[tuple[float, Karras]], own: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, name in zip(panels, ("first", "last", "rho"), strict=True):
        panel.plot([getattr(grid, name) for _, grid in found], [d for d, _ in found], "o")
        panel.axhline(own, color="gray", linestyle="--", label="the stage's own grid")
        panel.set(xlabel=name, xscale="linear" if name == "rho" else "log", yscale="log")
    panels[0].set(ylabel="FD-proxy to the true pictures")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
