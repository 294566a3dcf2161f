"""What people prefer: a blind study of two runs, and its answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cascade.commands.eval.options import Folder, progress, write
from cascade.errors import UserError

Run = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Make a blind side-by-side study of two runs as one HTML file.

    A run is a folder that `cascade sample --out` has written. Its pictures are paired with the
    other run's by prompt, and by their order among those of the same prompt. The page shows a pair
    at a time and asks which picture is of higher quality, and which shows better what the text
    says. It loads nothing from elsewhere, works by keys alone, keeps its answers in the browser,
    and gives them as a file for `cascade eval preference`. Which run drew which picture stands in
    the key alone: keep it from the raters. On stdout are the study's name, its pairs, also by
    category (for pictures whose JSON has a "category"), and what was left out.
    """

    run_a: Annotated[Run, tyro.conf.arg(metavar="RUN_A")]
    """The first run's folder; gs:// and s3:// names are understood."""
    run_b: Annotated[Run, tyro.conf.arg(metavar="RUN_B")]
    """The second run's folder."""
    out: Path
    """The page to write, a new file whose name ends in .html."""
    key: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: PAGE.key.json)")
    ] = None
    """The key to write, a new file."""
    side: Annotated[
        int | None,
        tyro.conf.arg(metavar="SIDE", help_behavior_hint="(default: the largest that all have)"),
    ] = None
    """Which pictures are shown, by their side in pixels."""
    pairs: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")
    ] = None
    """Pairs of the study, chosen at random, as many of each category as can be. Imagen's
    studies had 200."""
    seed: int = 0
    """Chooses the pairs, their order, and which run stands on the left of each."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Turn the answers of a blind study into win rates.

    On stdout are, for each question, overall and by category, the shares of answers for A, for
    neither and for B, and A's win rate, where an answer for neither counts half, with 95 %
    intervals; also how often two raters of one pair agree. Answers of several raters to one pair
    are not independent, which the intervals heed: their unit is the prompt. A table is on stderr.
    """

    answers: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="ANSWERS.json ...", help_behavior_hint=""),
    ] = ()
    """Files that raters have downloaded from the page, one of each rater."""
    key: Path
    """The key that `cascade eval compare` wrote with the page."""
    out: Folder = None
    """A folder for results.json and preference.png; new or empty."""


def compare(options: CompareOptions) -> dict[str, Any]:
    """Do `cascade eval compare`: write the page and its key, and return what goes to stdout."""
    if options.pairs is not None and options.pairs < 1:
        raise UserError(f"--pairs must be 1 or more, got {options.pairs}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32 - 1], got {options.seed}")
    from cascade.runner import output
    from cascade.storage import paths

    page = paths.path(options.out)
    key = page.with_suffix(".key.json") if options.key is None else paths.path(options.key)
    if page.suffix.lower() != ".html" or page.exists():
        raise UserError(f"--out {page}: must be a new file whose name ends in .html")
    if key.exists() or key == page:
        raise UserError(f"--key {key}: must be a new file")
    output.folder_of(options.out.parent)
    from cascade.evaluation import study

    names = (str(options.run_a), str(options.run_b))
    a, b = (study.read_run(paths.path(run)) for run in (options.run_a, options.run_b))
    pairs, left_out = study.pair_up(a, b, names)
    side = study.side_of(pairs, options.side)
    placed = study.places(pairs, seed=options.seed, count=options.pairs)
    with progress(2 * len(placed)) as advance:
        record = study.write(
            page, key, placed, side=side, seed=options.seed, runs=names, advance=advance
        )
    for count, what in (
        (left_out.prompts_of_a, f"prompts that only {names[0]} has"),
        (left_out.prompts_of_b, f"prompts that only {names[1]} has"),
        (left_out.pictures, "pictures of which the other run has none of the same prompt"),
    ):
        if count:
            print(f"left out: {count} {what}", file=sys.stderr)
    size = page.stat().st_size if isinstance(page, Path) else page.stat().length
    print(
        f"{page}: {len(placed)} pairs at {side} px, {size / 1e6:.1f} MB, for the raters\n"
        f"{key}: the key, which is to be kept from them",
        file=sys.stderr,
    )
    categories = [pair["category"] for pair in record["pairs"]]
    return {
        "study": record["study"],
        "pairs": len(placed),
        "categories": {c: categories.count(c) for c in sorted(set(categories) - {None})},
        "side": side,
        "seed": options.seed,
        "page": str(page),
        "bytes": size,
        "key": str(key),
        "left_out": {
            "prompts_of_a": left_out.prompts_of_a,
            "prompts_of_b": left_out.prompts_of_b,
            "pictures": left_out.pictures,
        },
    }


def preference(options: PreferenceOptions) -> dict[str, Any]:
    """Do `cascade eval preference`: fill options.out, if named, and return what goes to stdout."""
    if not options.answers:
        raise UserError("the answers are missing: name the files that the raters have downloaded")
    from cascade.evaluation import preference as measures
    from cascade.storage import paths

    def run(folder: Path | None) -> dict[str, Any]:
        key = measures.read_key(paths.path(options.key))
        answers = measures.read_answers([paths.path(file) for file in options.answers], key)
        report = measures.report(key, answers)
        print(measures.table(report), file=sys.stderr)
        if folder is not None:
            measures.plot(folder / "preference.png", report)
            write(folder, report)
        return report

    if options.out is None:
        return run(None)
    with paths.WholeFolder(options.out) as folder:
        return run(folder)


COMMANDS = {
    "compare": (
        CompareOptions,
        compare,
        "a blind side-by-side study of two runs, for people, as one HTML file",
    ),
    "preference": (
        PreferenceOptions,
        preference,
        "the win rates that the answers of such a study give",
    ),
}
