"""Six properties that an Imagen cascade has if its mechanisms do their work, measured.

Each is a set of claims (claims.py) about pictures of the same prompts, drawn from the same noise
with one thing changed, for three seeds. The claims are those of Saharia et al. 2022: guidance
(sec. 2.2), thresholding (2.3), noise conditioning augmentation (2.4; see also augmentation.py), and
a last stage without self-attention, trained on crops (2.5).

Prompts are those of scenes, whose facts the judge (judge.py) reads back from 64 px pictures: the
score of a picture is the share of its prompt's facts that it shows.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from cascade import images
from cascade.data.transforms import block_means
from cascade.diffusion.denoise import Constant, Threshold
from cascade.evaluation.claims import Measured, Property, above, alike
from cascade.evaluation.drawer import Drawer
from cascade.scenes.captions import Caption, caption_at
from cascade.scenes.judge import verdicts
from cascade.scenes.reading import Reading, read
from cascade.scenes.render import render
from cascade.scenes.spec import Scene

SEEDS = 3
PLAIN_GUIDANCE = 4.0  # for a base stage whose own settings have none
SATURATING = 32.0  # Imagen's sweep ends at 10; scenes' colours, 16 to 242, take more to saturate
THRESHOLDS = tuple(Threshold(kind=kind) for kind in ("none", "static", "dynamic"))
LEVELS = (0.0, 0.5, 1.0)  # of augmentation, in shares of the highest that a stage was trained for
SLACK = 0.05  # scores, shares of facts, that differ by less are as good as equal
CROP = 4  # the picture's side over a crop's (Imagen: crops of 256 from 1024 px)
EQUAL = (
    2.55  # levels of 8 bits, 1 % of the range; statistics of pixels that differ by less are equal
)

Picture = UInt8[np.ndarray, "s s 3"]
Advance = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A scene, its caption, and the seed of the picture that is drawn of it."""

    scene: Scene
    """What the picture is to show."""
    said: Caption
    """What the model is told of it."""
    seed: int
    """The seed of the picture's noise, in 0..2**32 - 1."""


Prompts = Sequence[Sequence[Prompt]]
"""[seeds][prompts]"""


def seeds_of(seed: int, prompts: int) -> list[int]:
    """The seeds of a run, so far apart that no two pictures begin with the same noise."""
    return [seed + k * prompts for k in range(SEEDS)]


def prompts_of(seed: int, prompts: int) -> Prompts:
    """The prompts of a run: for each seed S of it, those of `cascade eval scenes --seed S`."""
    found = []
    for one in seeds_of(seed, prompts):
        pairs = [caption_at(one, i, "seen") for i in range(prompts)]
        found.append(
            [Prompt(scene=scene, said=said, seed=one + i) for i, (scene, said) in enumerate(pairs)]
        )
    return found


def weights_of(drawer: Drawer) -> tuple[float, float, float]:
    """The guidance weights of `following`: 1, the mean of 1 and the highest, and the highest.

    The highest is that of the base stage's settings, or PLAIN_GUIDANCE where these have none.
    """
    own = drawer.settings[drawer.cascade.stages[0][0].config.name].guidance
    last = own if own > 1 else PLAIN_GUIDANCE
    return 1.0, (1 + last) / 2, last


def quarter(prompts: Prompts) -> Prompts:
    """A quarter of each seed's prompts, for the measures whose pictures take longer to draw."""
    return [row[: len(row) // 4] for row in prompts]


def drawings(prompts: Prompts) -> int:
    """How often the measures below call `advance`, all together.

    `sensitivity` and `larger_pictures` are given a `quarter` of the prompts, the others all.
    """
    each = [(prompts, 3 + len(THRESHOLDS)), (quarter(prompts), 2 * len(LEVELS) + 3)]
    return sum(times * len(row) for rows, times in each for row in rows)


def following(
    drawer: Drawer, prompts: Prompts, advance: Advance = lambda: None
) -> tuple[Property, Property]:
    """Two properties: guided pictures show more of their prompt, and of other prompts only chance.

    Both are measured on the same pictures, of the base stage. Chance is what true pictures show of
    other prompts. The guidance weight goes through `weights_of`. Scores level off somewhere, as
    guidance takes its toll of the pictures: from the middle weight on they need not rise, but may
    not fall. advance: called after each picture.
    """
    base = drawer.cascade.stages[0][0].config
    weights = weights_of(drawer)
    readings: dict[float, list[list[Reading]]] = {}
    for w in weights:
        draw = drawer.replaced([base.name], guidance=w)
        readings[w] = _each(prompts, lambda p, draw=draw: read(_base(draw, p)), advance)
    true = _each(prompts, lambda p: read(render(p.scene, base.resolution)))
    own = {w: _own_score(found, prompts) for w, found in readings.items()}
    none, middle, last = weights
    others, chance = (_others_score(found, prompts) for found in (readings[last], true))
    grows = Property(
        title="prompt-following grows with the guidance weight w",
        unit="share of a prompt's facts that its picture shows",
        how=f"{base.name}, the same prompts and noise at every w",
        figures={
            **{f"w={w:g}": score for w, score in own.items()},
            "true pictures": _own_score(true, prompts),
        },
        claims=[
            above(f"w={middle:g} above w={none:g}", own[middle], own[none]),
            above(f"w={last:g} above w={none:g}", own[last], own[none]),
            above(
                f"w={last:g} below w={middle:g} by less than {SLACK:g}",
                own[last] + SLACK,
                own[middle],
            ),
        ],
        chance=float(chance.mean()),
    )
    falls = Property(
        title="shuffled captions fall to chance",
        unit="share of a prompt's facts that a picture shows",
        how=f"{base.name} at w={last:g}; every picture is judged by its own prompt and by each "
        "other one of its seed; chance is the score of true pictures by the other prompts",
        figures={"own prompt": own[last], "other prompts": others},
        claims=[
            above("own prompt above other prompts", own[last], others),
            above(f"other prompts above chance by less than {SLACK:g}", chance + SLACK, others),
        ],
        chance=float(chance.mean()),
    )
    return grows, falls


def saturation(drawer: Drawer, prompts: Prompts, advance: Advance = lambda: None) -> Property:
    """Strong guidance in all steps drives pixels to the ends of the range, unless thresholded.

    Without thresholding it drives the most there, with dynamic thresholding the fewest. Chance is
    the share of such pixels in true pictures. advance: called after each picture.
    """
    base = drawer.cascade.stages[0][0].config
    shares = {}
    for threshold in THRESHOLDS:
        draw = drawer.replaced(
            [base.name], guidance=SATURATING, guidance_plan=Constant(), threshold=threshold
        )
        shares[threshold.kind] = _measured(
            prompts, lambda p, draw=draw: _saturated(_base(draw, p)), advance
        )
    true = _measured(prompts, lambda p: _saturated(render(p.scene, base.resolution)))
    kinds = list(shares)
    return Property(
        title="saturated pixels: no thresholding > static > dynamic",
        unit="share of pixel values that are 0 or 255",
        how=f"{base.name} at w={SATURATING:g} in all steps, the same prompts and noise for each",
        figures=shares,
        claims=[
            above(f"{more} above {less}", shares[more], shares[less])
            for more, less in zip(kinds, kinds[1:], strict=False)
        ],
        chance=float(true.mean()),
    )


def sensitivity(drawer: Drawer, prompts: Prompts, advance: Advance = lambda: None) -> Property:
    """The more noise on the small picture, the more a super-resolution stage goes by its prompt.

    It is measured on the first such stage, which enlarges true small pictures twice: with their own
    prompt and with another's. Chance is the response to the same prompt twice, which is 0. Little
    noise hides little, so the response need not rise at once: up to the middle level it may not
    fall, and at the highest it must be above that of both others. advance: called after each
    picture.
    """
    stage = next(s.config for s, _ in drawer.cascade.stages if s.config.lowres is not None)
    lowres: Any = stage.lowres
    side, factor = stage.resolution, stage.resolution // (stage.lowres_resolution or 1)
    changes = {}
    for level in (share * lowres.augmentation.max_level for share in LEVELS):
        draw = drawer.replaced([stage.name], aug_level=level)

        def change(prompt: Prompt, other: Prompt, draw=draw) -> float:
            lowres = block_means(render(prompt.scene, side), factor)
            drawn = []
            for text in (prompt, other):
                drawn.append(draw(text.said.text, prompt.seed, until=side, lowres=lowres)[side])
                advance()
            return _apart(*drawn)

        changes[f"level {level:g}"] = np.array(
            [[change(p, row[i - 1]) for i, p in enumerate(row)] for row in prompts]
        )
    none, middle, last = changes
    return Property(
        title="sensitivity of super-resolution to the prompt grows with the augmentation level",
        unit="mean |x(c1) - x(c2)| over pixels, in levels of 8 bits",
        how=f"{stage.name} on true small pictures; c1 their prompt, c2 another's; the same noise",
        figures=changes,
        claims=[
            above(f"{last} above {none}", changes[last], changes[none]),
            above(f"{last} above {middle}", changes[last], changes[middle]),
            above(
                f"{middle} below {none} by less than {SLACK:.0%}",
                changes[middle],
                (1 - SLACK) * changes[none],
            ),
        ],
        chance=0.0,
    )


def larger_pictures(drawer: Drawer, prompts: Prompts, advance: Advance = lambda: None) -> Property:
    """The last stage draws pictures of twice the side of its crops as well as crops.

    It enlarges the centre of true small pictures at both sizes, the crop twice, with other noise.
    The inner half of the crop is compared with the same place in the larger picture by its error,
    mean and standard deviation. Also, the larger picture may not differ more from a crop than two
    crops do from each other, by noise alone: that is chance here. advance: called after each
    picture.
    """
    stage, params = drawer.cascade.stages[-1]
    config, settings = stage.config, drawer.settings[stage.config.name]
    factor = config.resolution // (config.lowres_resolution or 1)
    crop = config.resolution // CROP // factor * factor
    inner = crop // 2

    def enlarged(prompt: Prompt, lowres: np.ndarray, number: int) -> np.ndarray:
        encoder: Any = drawer.cascade.encoder
        small, given = images.to_float(lowres)[None], {}
        for condition in config.conditions:
            told = condition.of_prompts([prompt.said.text], encoder)
            given[condition.name] = condition.of_lowres(small) if told is None else told
        key, side = jax.random.fold_in(jax.random.key(prompt.seed), number), factor * len(lowres)
        drawn = stage.sample(params, given, key[None], settings=settings, sides=(side, side))
        advance()
        return images.to_uint8(drawn)[0]

    def statistics(prompt: Prompt) -> dict[str, float]:
        truth = render(prompt.scene, config.resolution)
        lowres = block_means(truth, factor)
        crops = [
            _centre(enlarged(prompt, _centre(lowres, crop // factor), n), inner) for n in (0, 1)
        ]
        larger = _centre(enlarged(prompt, _centre(lowres, 2 * crop // factor), 2), inner)
        found = {
            f"{name} of {kind}": float(np.mean([statistic(x, _centre(truth, inner)) for x in some]))
            for name, statistic in _STATISTICS.items()
            for kind, some in (("larger", [larger]), ("crop", crops))
        }
        apart = [_apart(larger, one) for one in crops]
        return found | {
            "larger from crop": float(np.mean(apart)),
            "crop from crop": _apart(*crops),
        }

    rows = _each(prompts, statistics)
    figures = {name: np.array([[one[name] for one in row] for row in rows]) for name in rows[0][0]}
    attention = "with" if config.network.attends_to_itself else "without"
    apart, chance = figures["larger from crop"], figures["crop from crop"]
    return Property(
        title=f"{config.name} runs on larger images than its crops",
        unit="levels of 8 bits",
        how=f"{config.name}, {attention} self-attention, at {2 * crop} and at {crop} px; "
        "the inner half of the crop is compared",
        figures=figures,
        claims=[
            *(
                claim
                for name in _STATISTICS
                for claim in alike(
                    name, figures[f"{name} of larger"], figures[f"{name} of crop"], EQUAL
                )
            ),
            above(
                f"larger from crop above crop from crop by less than {EQUAL:g}",
                chance + EQUAL,
                apart,
            ),
        ],
        chance=float(chance.mean()),
    )


def table(properties: Mapping[str, Property]) -> str:
    """The properties as text for people: a line for each, and one for each of its claims."""
    lines = []
    for name, one in properties.items():
        lines.append(f"({name}) {'holds' if one.holds else 'DOES NOT HOLD'}: {one.title}")
        figures = [f"{key} {values.mean():.4g}" for key, values in one.figures.items()]
        chance = [] if one.chance is None else [f"chance {one.chance:.4g}"]
        lines.append(f"    {', '.join(figures + chance)} ({one.unit})")
        for claim in one.claims:
            mark = "yes" if claim.holds else "NO"
            lines.append(f"    {mark:<4}{claim.margin:8.1f} standard errors: {claim.text}")
    return "\n".join(lines)


def plot(path: Path, properties: Mapping[str, Property]) -> None:
    """Write a PNG with a panel for each property.

    It shows its figures, a dot for each seed, a bar at the mean, and chance as a dashed line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(2, -(-len(properties) // 2), squeeze=False).ravel()
    for panel, (name, one) in zip(panels, properties.items(), strict=False):
        for x, values in enumerate(one.figures.values()):
            panel.plot([x] * len(values), values.mean(axis=1), "o", color="tab:blue", alpha=0.6)
            panel.hlines(values.mean(), x - 0.3, x + 0.3, color="tab:blue")
        if one.chance is not None:
            panel.axhline(one.chance, linestyle="--", color="gray", label="chance")
            panel.legend(fontsize=8)
        panel.set_xticks(range(len(one.figures)), list(one.figures), rotation=30, ha="right")
        verdict = "holds" if one.holds else "does not hold"
        title = textwrap.fill(f"({name}) {one.title}: {verdict}", 55)
        panel.set_title(title, fontsize=9)
        panel.set_ylabel(one.unit, fontsize=8)
    figure.savefig(path, dpi=120)


def _apart(a: Picture, b: Picture) -> float:
    """The mean absolute difference in levels of 8 bits."""
    return float(np.abs(a.astype(np.float64) - b).mean())


_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "error": _apart,
    "mean": lambda x, true: float(x.mean()),
    "standard deviation": lambda x, true: float(x.std()),
}


def _each(
    prompts: Prompts, measure: Callable[[Prompt], Any], advance: Advance = lambda: None
) -> list[list[Any]]:
    """What `measure` gives for each prompt, [seeds][prompts]; `advance` is called after each."""
    rows = []
    for row in prompts:
        rows.append([])
        for prompt in row:
            rows[-1].append(measure(prompt))
            advance()
    return rows


def _measured(
    prompts: Prompts, measure: Callable[[Prompt], float], advance: Advance = lambda: None
) -> Measured:
    return np.array(_each(prompts, measure, advance))


def _base(draw: Drawer, prompt: Prompt) -> Picture:
    side = draw.cascade.stages[0][0].config.resolution
    return draw(prompt.said.text, prompt.seed, until=side)[side]


def _score(reading: Reading, said: Caption) -> float:
    return float(np.mean([verdict.right for verdict in verdicts(reading, said.facts)]))


def _own_score(readings: Sequence[Sequence[Reading]], prompts: Prompts) -> Measured:
    return np.array(
        [
            [_score(reading, prompt.said) for reading, prompt in zip(*row, strict=True)]
            for row in zip(readings, prompts, strict=True)
        ]
    )


def _others_score(readings: Sequence[Sequence[Reading]], prompts: Prompts) -> Measured:
    """The mean score of each picture by all other prompts of its seed."""
    return np.array(
        [
            [
                np.mean([_score(reading, p.said) for j, p in enumerate(row) if j != i])
                for i, reading in enumerate(found)
            ]
            for found, row in zip(readings, prompts, strict=True)
        ]
    )


def _centre(picture: UInt8[np.ndarray, "s s 3"], side: int) -> UInt8[np.ndarray, "t t 3"]:
    start = (len(picture) - side) // 2
    return picture[start : start + side, start : start + side]


def _saturated(picture: Picture) -> float:
    return float(np.mean((picture == 0) | (picture == 255)))
