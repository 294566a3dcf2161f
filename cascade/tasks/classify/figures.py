"""What classifier guidance does to scenes: `cascade eval classify`.

A classifier is asked for a colour and a background, such as red on navy; all else of a picture is
left open. By scale of the guidance: how many pictures show both, as the scenes' judge reads them
(which has learned nothing, and is not the classifier), and how far the pictures of one request are
from one another. Alone, with guidance 0, the stage knows nothing of it; else its prompt tells of a
thing of that colour, and the background is left to the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cascade import images
from cascade.evaluation.claims import Claim, above
from cascade.runner.cascade import Cascade
from cascade.scenes import spec
from cascade.scenes.judge import share
from cascade.scenes.reading import read
from cascade.tasks.classify.steering import guiding

Picture = UInt8[np.ndarray, "s s 3"]
SEEDS = 2
"""Sets of requests; claims are about both."""
PER_REQUEST = 6
"""Pictures drawn of each request."""


class Request(NamedTuple):
    """What is asked for, and the seed of its first picture. The shape is in the prompt alone."""

    colour: spec.Colour
    shape: spec.Shape
    background: spec.Background
    seed: int

    @property
    def attributes(self) -> str:
        """What the classifier is asked for."""
        return f"{self.colour}, {self.background} background"

    @property
    def prompt(self) -> str:
        """What the model is told, if it is told something."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape}"


class Drawn(NamedTuple):
    """What was drawn at one weight and scale.

    pictures: [SEEDS, requests, PER_REQUEST, s, s, 3]. right: whether each shows what the classifier
    was asked for, and told: what the prompt tells of; [SEEDS, requests * PER_REQUEST], 0 or 1.
    spread: for each request the mean distance of two of its pictures in levels, [SEEDS, requests].
    """

    pictures: np.ndarray
    right: np.ndarray
    told: np.ndarray
    spread: np.ndarray


def requests(seed: int, n: int) -> list[list[Request]]:
    """For each of SEEDS seeds n requests, whose colours and shapes training had together."""
    rng = np.random.Generator(np.random.PCG64(seed))
    pairs = [(c, s) for s in spec.SHAPES for c in spec.COLOURS if (s, c) not in spec.HELD_OUT]
    own = []
    for i, k in enumerate(rng.permutation(len(pairs))[: SEEDS * n]):
        background = spec.BACKGROUNDS[i % len(spec.BACKGROUNDS)]
        colour, shape = pairs[k]
        own.append(Request(colour, shape, background, seed + i * PER_REQUEST))
    return [own[i * n : (i + 1) * n] for i in range(SEEDS)]


def seen(picture: Picture, request: Request) -> tuple[bool, bool]:
    """Whether a picture shows what the classifier is asked for, and what the prompt tells of."""
    found = read(picture)
    coloured = any(thing.colour == request.colour for thing in found.objects)
    right = coloured and found.background == request.background
    told = any((o.colour, o.shape) == (request.colour, request.shape) for o in found.objects)
    return right, told


def spread(pictures: Sequence[Picture]) -> float:
    """The mean over pairs of the root of the mean squared difference, in levels of 255."""
    levels = np.asarray(pictures, np.float64)
    apart = [np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(levels) for b in levels[i + 1 :]]
    return float(np.mean(apart))


def drawn(
    model: Cascade,
    classifier: tuple[Any, Any],
    asked: Sequence[Sequence[Request]],
    guidance: float,
    scale: float,
    advance: Callable[[int], Any] = lambda n: None,
) -> Drawn:
    """Draw PER_REQUEST pictures of each request with the first stage, and look at them.

    guidance: the weight of classifier-free guidance; 0 draws without the prompt.
    """
    stage = model.stages[0][0].config
    every, right, told, apart = [], [], [], []
    for own in asked:
        for request in own:
            found = model(
                request.prompt,
                seed=request.seed,
                num=PER_REQUEST,
                until=stage.resolution,
                guidance=guidance,
                threshold="static",
                steering=[guiding(stage, classifier, request.attributes, scale)],
                batch_size=PER_REQUEST,
            )
            pictures = [one.image for one in found]
            every.append(pictures)
            verdicts = [seen(picture, request) for picture in pictures]
            right.append([asked_for for asked_for, _ in verdicts])
            told.append([of_prompt for _, of_prompt in verdicts])
            apart.append(spread(pictures))
            advance(PER_REQUEST)
    n = len(asked)
    pictures = np.asarray(every)
    return Drawn(
        pictures.reshape(n, -1, *pictures.shape[1:]),
        np.reshape(right, (n, -1)).astype(float),
        np.reshape(told, (n, -1)).astype(float),
        np.reshape(apart, (n, -1)),
    )


def row(guidance: float, scale: float, found: Drawn) -> dict[str, Any]:
    """JSON values of what was drawn at one weight and scale, with 95 % intervals."""
    mean, n = float(found.spread.mean()), found.spread.size
    half = 1.96 * float(found.spread.std(ddof=1)) / n**0.5
    return {
        "guidance": guidance,
        "scale": scale,
        "right": share(bool(one) for one in found.right.ravel()),
        "told": share(bool(one) for one in found.told.ravel()),
        "spread": round(mean, 2),
        "spread_interval": [round(mean - half, 2), round(mean + half, 2)],
    }


def claims(by_scale: dict[float, Drawn], guidance: float) -> list[Claim]:
    """The claims that every scale above the first has more right than that, and less spread."""
    (least, first), *others = by_scale.items()
    where = f"guidance {guidance:g}, scale"
    return [
        claim
        for scale, found in others
        for claim in (
            above(f"{where} {scale:g}: more right than {least:g}", found.right, first.right),
            above(f"{where} {scale:g}: more alike than {least:g}", first.spread, found.spread),
        )
    ]


def plot(path: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG: what is right, and how far pictures are apart, over the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    weights = list(dict.fromkeys(row["guidance"] for row in rows))
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    for weight in weights:
        own = [row for row in rows if row["guidance"] == weight]
        label = f"guidance {weight:g}" if weight else "alone (guidance 0)"
        shares = [(row["right"]["share"], row["right"]["interval"]) for row in own]
        spreads = [(row["spread"], row["spread_interval"]) for row in own]
        for panel, values in ((left, shares), (right, spreads)):
            y = [value for value, _ in values]
            off = [[abs(v - interval[end]) for v, interval in values] for end in (0, 1)]
            x = [scales.index(row["scale"]) for row in own]
            panel.errorbar(x, y, yerr=off, marker="o", capsize=2, label=label)
    left.set(ylabel="pictures that show what was asked for", ylim=(0, 1.02))
    right.set(ylabel="distance of two pictures of a request, in levels", ylim=(0, None))
    for panel in (left, right):
        panel.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        panel.set(xlabel="scale of the classifier's guidance")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def sheet(path: Any, found: dict[tuple[float, float], Drawn], columns: int = 8) -> None:
    """Write a PNG: a row for each weight and scale, two pictures of each request of one seed."""
    rows, names = [], []
    for (weight, scale), one in found.items():
        tiles = one.pictures[0][:, :2].reshape(-1, *one.pictures.shape[-3:])
        large = [tile.repeat(2, 0).repeat(2, 1) for tile in tiles[:columns]]
        rows.append(images.grid(large, len(large)))
        names.append(
            f"guidance {weight:g}, scale {scale:g}" if weight else f"alone, scale {scale:g}"
        )
    images.save_png(path, images.grid(images.captioned(rows, names), 1))
