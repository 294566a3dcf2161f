"""Classifier guidance: a classifier of noised pictures says where to go.

    cascade sample "a red circle" --attributes "red circle, navy background" --attribute-scale 4

A classifier p(c | x_t) of pictures as noisy as those that are being drawn has a gradient in x_t,
along which every step moves what the picture is thought to be (Dhariwal & Nichol 2021, sec. 4; Song
et al. 2021):

    x0_hat + s (sigma^2 / alpha) grad log p(c | x_t)

The stage knows nothing of it, and need not know what a text is: with --guidance 0 it draws without
its prompt, and the classifier alone says what is drawn. With a larger scale s more pictures have
the attributes, and they are more alike. Thresholding is static unless --threshold says otherwise:
the gradient puts large values into few pixels, for which dynamic thresholding dims all others.

`classifier.py` has the network, `training.py` its job, `scenes.py` the scenes that it is trained
on, `steering.py` what it does to a run, `figures.py` what `cascade eval classify` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cascade import config
from cascade.devices.terminal import bar
from cascade.errors import OptionError, UserError

if TYPE_CHECKING:
    from cascade.stage import Sampling, StageConfig, Steering

MOST_SCALE = 1e4


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What classifier guidance adds to `cascade sample`."""

    attributes: Annotated[
        str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="(default: none)")
    ] = None
    """Draw pictures that a classifier finds to have these attributes, with commas between: "red
    circle, navy background". With --guidance 0 they alone say what is drawn."""
    attribute_scale: Annotated[float | None, tyro.conf.arg(metavar="S", help_behavior_hint="")] = (
        None
    )
    """How much --attributes count, 0 or more; 1 is as in Bayes' rule, were the classifier right.
    Default: 4."""
    classifier: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """The classifier: RUN/classifier of a training (configs/classify). Default: the one that ships,
    which knows scenes."""

    def __post_init__(self):
        more = {"--attribute-scale": self.attribute_scale, "--classifier": self.classifier}
        for flag, value in more.items():
            if value is not None and self.attributes is None:
                raise UserError(f"{flag} {value}: goes with --attributes, which is missing")
        if self.attribute_scale is not None:
            check_scale("attribute_scale", self.attribute_scale)

    def stages(self, stages: Sequence[StageConfig]) -> Sequence[StageConfig]:
        """The stages that draw, with the settings over which those of the command are laid."""
        if self.attributes is None:
            return stages
        from cascade.tasks.classify.steering import guided

        return [guided(stages[0]), *stages[1:]]

    def steering(
        self,
        stages: Sequence[StageConfig],
        every: Sequence[StageConfig],
        settings: Sequence[Sampling],
    ) -> list[Steering | None]:
        """Steers the first stage that draws; the others enlarge what it has drawn."""
        if self.attributes is None:
            return [None] * len(stages)
        from cascade.tasks.classify.classifier import load
        from cascade.tasks.classify.steering import guiding

        scale = 4.0 if self.attribute_scale is None else self.attribute_scale
        loaded = load(self.classifier)
        own = guiding(stages[0], loaded, self.attributes, scale)
        return [own, *[None] * (len(stages) - 1)]

    def record(
        self, stages: Sequence[StageConfig], steering: Sequence[Steering | None]
    ) -> dict[str, Any]:
        """What the JSON beside a picture says of it."""
        if self.attributes is None:
            return {"attributes": None}
        own: Any = steering[0]
        told = {"asked": own.names, "scale": float(own.scale), "classifier": self.classifier}
        return {"attributes": told}


def check_scale(option: str, scale: float) -> None:
    """Raise OptionError for a scale out of range."""
    if not 0 <= scale <= MOST_SCALE:
        raise OptionError(option, scale, f"must be in [0, {MOST_SCALE:g}]")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure classifier guidance with a model that draws scenes.

    A colour and a background are asked for. OUT gets sweep.png (how many pictures show both, and
    how far those of one request are apart, over the scale), sheet.png (a row for each scale, at the
    least weight and the largest) and results.json, which is also on stdout, with 95 % intervals and
    the claims that a larger scale has more right and is less varied. It must be new or empty. The
    first stage alone draws.
    """

    out: Path
    """The folder to write."""
    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    classifier: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the one that ships)")
    ] = None
    """RUN/classifier of a training (configs/classify)."""
    requests: int = 8
    """Requests of each of two seeds, 2 to 35; of each, six pictures are drawn."""
    scales: str = "0,1,2,4,8"
    """Scales of the guidance, two or more, the least first, with commas between."""
    guidance: str = "0,1,3"
    """Weights of classifier-free guidance, with commas between; 0 draws without the prompt, which
    leaves the classifier alone, and 1 is none."""
    seed: int = 0
    """Which requests, 0 or more."""


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Attributes right, and variety, by scale of classifier guidance."""
    options = config.parse(EvalOptions, argv, prog="cascade eval classify")
    if not 2 <= options.requests <= 35:
        raise UserError(f"--requests must be 2 to 35, got {options.requests}")
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed must be in [0, 2^31), got {options.seed}")
    scales = numbers("scales", options.scales)
    if len(scales) < 2:
        raise OptionError("scales", options.scales, "must be two or more")
    weights = numbers("guidance", options.guidance)
    from cascade.runner.cascade import Cascade
    from cascade.scenes.reading import SIDES
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.tasks.classify import figures
    from cascade.tasks.classify.classifier import load

    with WholeFolder(options.out) as folder:
        model, classifier = Cascade.load(options.model), load(options.classifier)
        if (side := model.stages[0][0].config.resolution) not in SIDES:
            raise UserError(
                f"--model {options.model}: its first stage draws {side} px, and pictures are read "
                f"at {', '.join(map(str, SIDES))}; give a model of scenes"
            )
        asked = figures.requests(options.seed, options.requests)
        count = figures.SEEDS * options.requests * figures.PER_REQUEST
        total = count * len(weights) * len(scales)
        found, claims = {}, []
        with bar(total=total, unit="picture", desc="guiding") as shown:
            for weight in weights:
                own = {}
                for scale in scales:
                    own[scale] = figures.drawn(
                        model, classifier, asked, weight, scale, shown.update
                    )
                claims += figures.claims(own, weight)
                found |= {(weight, scale): one for scale, one in own.items()}
        rows = [figures.row(weight, scale, one) for (weight, scale), one in found.items()]
        figures.plot(folder / "sweep.png", rows)
        ends = {key: one for key, one in found.items() if key[0] in (weights[0], weights[-1])}
        figures.sheet(folder / "sheet.png", ends)
        report = {
            "model": options.model,
            "model_sha256": model.digest,
            "classifier": options.classifier,
            "seed": options.seed,
            "pictures": count,
            "points": rows,
            "claims": [claim.as_json() for claim in claims],
        }
        write_json(folder / "results.json", report)
    return report


def numbers(option: str, given: str) -> list[float]:
    """The numbers of a list with commas between, 0 or more, rising. Raises OptionError."""
    try:
        values = [float(word) for word in given.split(",")]
    except ValueError:
        raise OptionError(option, given, "must be numbers with commas between") from None
    if not all(0 <= value <= MOST_SCALE for value in values) or sorted(set(values)) != values:
        raise OptionError(option, given, f"must rise, and be in [0, {MOST_SCALE:g}]")
    return values
