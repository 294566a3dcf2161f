"""What people prefer: the answers of a blind study, joined with its key, as win rates.

The study is made by `study` and shown by `study_page`; the figures are those of the comparisons on
DrawBench in Saharia et al. 2022 ("Imagen", sec. 4.3): for each question the shares of answers for
either run and for neither, overall and by category.

Intervals hold for prompts like these, with these raters. Several raters' answers to one pair are
not independent, nor are answers to several pairs of one prompt, so the unit is the prompt: a share
is the mean over prompts of the mean over a prompt's answers, and its standard error is that of the
prompts' means. It enters the interval of Wilson 1927, eq. 4, which stays within [0, 1] and has a
width where all agree, as the number of independent answers that would have the same standard error
(the effective sample size of Korn and Graubard 1998, "Confidence intervals for proportions with
small expected number of positive counts estimated from survey data"). That number is at least the
prompts' and at most the answers'. With one rater, and one pair of each prompt, the intervals of the
shares are Wilson's own.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cascade.config import read_json
from cascade.errors import UserError
from cascade.evaluation.study_page import CHOICES, QUESTIONS, Question
from cascade.storage import paths

Preferred = Literal["a", "same", "b"]
PREFERRED: tuple[Preferred, ...] = get_args(Preferred)
"""What an answer says once the key is known: run A, neither, run B."""
WITHOUT_CATEGORY = "(none)"
"""What reports call the category of prompts that have none, where others have one."""
MOST_BARS = 60
"""Categories that a figure shows."""
Z = 1.959964
"""The 97.5 % point of the normal distribution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyPair:
    """What the key knows of one pair."""

    prompt: str
    """What both pictures were to show."""
    category: str | None
    """The category of the prompt; None is none."""
    left: Literal["a", "b"]
    """The run whose picture stood on the left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """The key of a study."""

    study: str
    """The study's identity, which answers name too."""
    runs: tuple[str, str]
    """The names of runs A and B."""
    pairs: Mapping[int, KeyPair]
    """Number of the pair -> the pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rater says of one pair."""

    rater: str
    """The rater's name, as it was given."""
    pair: int
    """The number of the pair."""
    preferred: Mapping[Question, Preferred]
    """Question -> the run that is preferred."""


def read_key(file: paths.Path) -> Key:
    """Read a key as `study.write` makes them. Raises UserError for any other file."""
    record: Any = read_json(file)
    rule = "is no key of a study; give the file that `cascade eval compare` wrote beside its page"
    pairs = {}
    try:
        runs = record["runs"]
        study, names = _text(record["study"]), (_text(runs["a"]), _text(runs["b"]))
        for one in record["pairs"]:
            category = one["category"] if one["category"] is None else _text(one["category"])
            if one["left"] not in ("a", "b") or type(one["pair"]) is not int:
                raise ValueError
            pairs[one["pair"]] = KeyPair(
                prompt=_text(one["prompt"]), category=category, left=one["left"]
            )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--key {file}: {rule}") from None
    if not pairs:
        raise UserError(f"--key {file}: {rule}")
    return Key(study=study, runs=names, pairs=pairs)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def read_answers(files: Sequence[paths.Path], key: Key) -> list[Answer]:
    """Read the files that raters have downloaded.

    Raises UserError for a file that is none, that answers another study or a pair that this one has
    not, for words that are no answer, and for a pair that one rater has answered twice, in whatever
    files; names that differ in case alone are one rater's.
    """
    found: list[Answer] = []
    seen: dict[tuple[str, int], paths.Path] = {}
    for file in files:
        for answer in _answers(file, key):
            own = (answer.rater.casefold(), answer.pair)
            if own in seen:
                where = "twice in it" if seen[own] == file else f"in {seen[own]} too"
                raise UserError(
                    f"answers {file}: {answer.rater!r:.80} has answered pair "
                    f"{answer.pair} {where}; "
                    "give each rater's last file alone, and each rater a name of its own"
                )
            seen[own] = file
            found.append(answer)
    if not found:
        raise UserError("the answers are empty: no rater has answered both questions of any pair")
    return found


def _answers(file: paths.Path, key: Key) -> list[Answer]:
    record, where = read_json(file), f"answers {file}"
    if not isinstance(record, dict) or not isinstance(record.get("answers"), list):
        raise UserError(f"{where}: is no file of answers; give one that the study's page downloads")
    if record.get("study") != key.study:
        raise UserError(
            f"{where}: answers the study {record.get('study')!r:.40}, and the key is that of "
            f"{key.study!r}; give the key that was written with that page"
        )
    rater = record.get("rater")
    if not isinstance(rater, str) or not rater.strip():
        raise UserError(f'{where}: "rater" must be a name, got {rater!r:.80}; write it there')
    return [_answer(one, rater.strip(), key, where) for one in record["answers"]]


def _answer(one: Any, rater: str, key: Key, where: str) -> Answer:
    number = one.get("pair") if isinstance(one, dict) else None
    if type(number) is not int or number not in key.pairs:
        raise UserError(
            f"{where}: pair {number!r:.40} is none of the study's, which are 1 to {len(key.pairs)}"
        )
    preferred: dict[Question, Preferred] = {}
    for question in QUESTIONS:
        choice = one.get(question)
        if choice not in CHOICES:
            raise UserError(
                f'{where}: pair {number}: "{question}" must be one of {", ".join(CHOICES)}, got '
                f"{choice!r:.80}"
            )
        left = key.pairs[number].left
        right: Preferred = "b" if left == "a" else "a"
        preferred[question] = "same" if choice == "same" else left if choice == "left" else right
    return Answer(rater=rater, pair=number, preferred=preferred)


def report(key: Key, answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of a study, as JSON values; see the top of this file for how they are meant.

    They are {"study", "runs", "raters": {name: answers}, "pairs": {"answered", "of"}, "questions":
    {question: {"overall": FIGURES, "categories": {category: FIGURES}, "agreement"}}}. FIGURES are
    {"prompts", "pairs", "answers", "a": SHARE, "same": SHARE, "b": SHARE, "win_rate_a": SHARE}. A
    SHARE has "share", in [0, 1], and "interval", the 95 % one; those of a, same and b also have
    "answers", how many there are. The win rate counts an answer "same" half. For "agreement" see
    `agreement`.
    """
    numbers = collections.Counter(one.rater for one in answers)
    categories = sorted({_category(key, one) for one in answers})
    named = categories != [WITHOUT_CATEGORY]
    return {
        "study": key.study,
        "runs": {"a": key.runs[0], "b": key.runs[1]},
        "raters": dict(sorted(numbers.items())),
        "pairs": {"answered": len({one.pair for one in answers}), "of": len(key.pairs)},
        "questions": {
            question: {
                "overall": figures(key, answers, question),
                "categories": {
                    category: figures(
                        key, [one for one in answers if _category(key, one) == category], question
                    )
                    for category in (categories if named else ())
                },
                "agreement": agreement(answers, question),
            }
            for question in QUESTIONS
        },
    }


def _category(key: Key, answer: Answer) -> str:
    return key.pairs[answer.pair].category or WITHOUT_CATEGORY


def figures(key: Key, answers: Sequence[Answer], question: Question) -> dict[str, Any]:
    """FIGURES of `report`, of these answers to a question; there must be one."""

    def share(score: Callable[[Preferred], float]) -> dict[str, Any]:
        by_prompt = collections.defaultdict(list)
        for one in answers:
            by_prompt[key.pairs[one.pair].prompt].append(score(one.preferred[question]))
        value, (low, high) = mean_and_interval(list(by_prompt.values()))
        return {"share": round(value, 4), "interval": [round(low, 4), round(high, 4)]}

    counts = collections.Counter(one.preferred[question] for one in answers)
    return {
        "prompts": len({key.pairs[one.pair].prompt for one in answers}),
        "pairs": len({one.pair for one in answers}),
        "answers": len(answers),
        **{
            name: {"answers": counts[name], **share(lambda said, name=name: float(said == name))}
            for name in PREFERRED
        },
        "win_rate_a": share(lambda said: {"a": 1.0, "same": 0.5, "b": 0.0}[said]),
    }


def mean_and_interval(groups: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """The mean of the groups' means, and its 95 % interval, which the top of this file tells of.

    groups: scores in [0, 1]; those of one group need not be independent, groups are. None is empty.
    """
    means = np.array([np.mean(group) for group in groups])
    n, most = len(means), sum(map(len, groups))
    p = float(means.mean())
    independent = float(n)
    if n > 1 and 0 < p < 1:
        variance = float(means.var(ddof=1)) / n
        independent = most if variance == 0 else min(max(p * (1 - p) / variance, n), most)
    middle = (p + Z * Z / (2 * independent)) / (1 + Z * Z / independent)
    half = (p * (1 - p) / independent + Z * Z / (4 * independent**2)) ** 0.5
    half *= Z / (1 + Z * Z / independent)
    return p, (max(middle - half, 0.0), min(middle + half, 1.0))


def agreement(answers: Sequence[Answer], question: Question) -> dict[str, Any] | None:
    """How often two raters of one pair say the same, as JSON values; None if no pair has two.

    They are {"share", "couples", "chance"}: the share of couples of answers to one pair that are
    equal, the number of couples, and the share that would be equal if each answer were drawn from
    all, whatever the pair.
    """
    by_pair = collections.defaultdict(list)
    for one in answers:
        by_pair[one.pair].append(one.preferred[question])
    couples = [c for said in by_pair.values() for c in itertools.combinations(said, 2)]
    if not couples:
        return None
    counts = collections.Counter(one.preferred[question] for one in answers)
    return {
        "share": round(sum(a == b for a, b in couples) / len(couples), 4),
        "couples": len(couples),
        "chance": round(sum((count / len(answers)) ** 2 for count in counts.values()), 4),
    }


_TITLES = {"quality": "higher quality", "text": "shows the text better"}


def table(found: Mapping[str, Any]) -> str:
    """A report as text for people, with a line for each question and category."""
    lines = [f"{name.upper()} is {_printable(run)}" for name, run in found["runs"].items()]
    for question, one in found["questions"].items():
        lines.append(f"{_TITLES[question]}:")
        for name, own in {"overall": one["overall"], **one["categories"]}.items():
            shares = ", ".join(f"{w} {own[k]['share']:.0%}" for k, w in _LEGEND.items())
            low, high = own["win_rate_a"]["interval"]
            lines.append(
                f"    {_printable(name)}: {shares}; A wins {own['win_rate_a']['share']:.1%} "
                f"({low:.1%} to {high:.1%}), {own['answers']} answers to {own['pairs']} pairs"
            )
        if agreed := one["agreement"]:
            lines.append(
                f"    two raters agree in {agreed['share']:.0%} of {agreed['couples']} couples; "
                f"by chance they would in {agreed['chance']:.0%}"
            )
    return "\n".join(lines)


_LEGEND = {"a": "A", "same": "same", "b": "B"}


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """Write a PNG of a report: for each question a panel, with a bar for each category.

    A bar has the shares of answers for A, for neither and for B, from the left; its lines are the
    95 % intervals of A's share and of B's. Of many categories the first MOST_BARS are shown.
    """
    from matplotlib.figure import Figure

    questions = found["questions"]
    names = ["overall", *next(iter(questions.values()))["categories"]][: 1 + MOST_BARS]
    size = (13, 1.9 + 0.5 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    colours = {"a": "#7ea6cf", "same": "#d3d3d3", "b": "#eba56a"}
    runs = found["runs"]
    labels = {"a": f"A: {_label(runs['a'])}", "same": "the same", "b": f"B: {_label(runs['b'])}"}
    for panel, (question, one) in zip(panels, questions.items(), strict=True):
        bars = [one["overall"], *one["categories"].values()][: len(names)]
        y, starts = np.arange(len(bars)), np.zeros(len(bars))
        for kind, colour in colours.items():
            shares = np.array([bar[kind]["share"] for bar in bars])
            panel.barh(y, shares, left=starts, color=colour, label=labels[kind], height=0.7)
            for at, start, share in zip(y, starts, shares, strict=True):
                if share >= 0.08:
                    panel.text(start + share / 2, at, f"{share:.0%}", ha="center", va="center")
            starts = starts + shares
        for at, bar in zip(y, bars, strict=True):
            low, high = bar["a"]["interval"]
            _interval(panel, low, high, at - 0.25)
            low, high = bar["b"]["interval"]
            _interval(panel, 1 - high, 1 - low, at + 0.25)
        panel.set(title=_TITLES[question], xlim=(0, 1), yticks=y)
        panel.set(ylim=(len(bars) - 0.5, -0.5), xlabel="share of answers, with 95 % intervals")
        numbered = zip(names, bars, strict=True)
        panel.set_yticklabels([f"{_label(name)} ({bar['answers']})" for name, bar in numbered])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    handles, told = panels[0].get_legend_handles_labels()
    figure.legend(handles, told, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def _interval(panel: Any, low: float, high: float, y: float) -> None:
    panel.errorbar(
        [(low + high) / 2], [y], xerr=[(high - low) / 2], color="black", capsize=2.5, linewidth=1
    )


def _label(name: str) -> str:
    """A name as a figure shows it: not too long, and with no dollar that begins a formula."""
    name = _printable(name)
    return (name if len(name) <= 40 else f"...{name[-37:]}").replace("$", r"\$")


def _printable(name: str) -> str:
    """A name from a file of anybody's, of which no character moves a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
