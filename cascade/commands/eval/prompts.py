"""Sets of prompts: drawn as a whole, by category; and their questions answered on scenes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade.commands.eval.options import (
    Options,
    check,
    described,
    drawer_of,
    drawing,
    is_first,
    processes,
    progress,
    write,
)
from cascade.commands.sample import ByStage, Until
from cascade.errors import UserError

if TYPE_CHECKING:
    from cascade.evaluation.prompt_sets import PromptFile

Column = Annotated[
    str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as in the public sets)")
]


@dataclass(frozen=True, kw_only=True)
class PromptsOptions(Options):
    """Draw a whole set of prompts by category, such as DrawBench or PartiPrompts.

    Each FILE is DrawBench's csv, PartiPrompts.tsv, JSON lines as GenEval's
    evaluation_metadata.jsonl, any csv or tsv, or text with one prompt a line as of T2I-CompBench;
    its content says which. None is downloaded: the error of a missing file tells where people get
    them. Prompts of text have no category; of several files, each is one.
    OUT gets the pictures as `cascade sample` writes them (0000_64.png, ..., and 0000.json, which
    also says "category" and, in "of_set", what else the set says of the prompt), run.json and
    index.html, a page with all of them. The command may be stopped at any time: given again, it
    goes on where it was, and draws the same files. With other prompts, model or settings it is
    refused. On stdout are the counts by category, and what the pictures were made with. Several
    processes, started as `cascade train --help` says, share the pictures among them.
    """

    files: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(name="file", metavar="FILE ...", help_behavior_hint=""),
    ] = ()
    """The files of prompts."""
    out: Path
    """The folder to write, or to go on with."""
    seed: int = 0
    """Picture i of prompt p, both counted from 0, has this seed + 1000 p + i."""
    samples: int = 1
    """Pictures of each prompt, at most 1000; people judged 8 of DrawBench, and GenEval has 4."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels (64, 256 or 1024)."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by stage; 1 is none."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage, as `cascade sample --guidance-plan`."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""
    batch: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Pictures drawn together, at most 4096; default 1 on a CPU, 8 elsewhere. Another number may
    round a last bit of a picture otherwise."""
    layout: Literal["cascade", "geneval", "geneval2", "t2i-compbench"] = "cascade"
    """Write the largest pictures once more, as another evaluation reads them, into a folder of this
    name in OUT, when all are drawn (links, which take no room on the disk): geneval
    (00000/metadata.jsonl, 00000/samples/0000.png; of JSON lines alone), t2i-compbench
    (samples/PROMPT_000000.png), or geneval2 (image_paths.json, each prompt's first picture).
    cascade is what is there anyway. It can be asked for later."""
    prompt_column: Column = None
    """The column, or key of JSON lines, that holds the prompts; by default prompt or prompts."""
    category_column: Column = None
    """The column, or key, that holds the categories; by default category or tag, if there is."""


@dataclass(frozen=True, kw_only=True)
class DrawbenchOptions(Options):
    """Ask the questions of DrawBench about scenes, whose pictures are read back exactly.

    The scenes analogue of DrawBench (Imagen, sec. 4.1) has seven of its categories: colors,
    counting (two to four copies), conflicting (shapes in colours that training never had),
    positional, descriptions (three or four objects), misspellings (a typo in each noun and colour)
    and rare words (crimson, disc, ... which no caption of training had). In the last two, truth is
    what the prompt means, and the same prompts spelled as in training are drawn beside them. The
    grammar has no writing in pictures, and none of the sets of Reddit, DALL-E and Gary Marcus. On
    stdout are for each category and side, with 95 % intervals (Wilson): "asked", the share right of
    the facts that the category is about (colours, counts, the new pairs, places; in the others all
    facts); "facts", of all facts; "prompts", of those that are wholly right; and "chance", the same
    three of the same pictures judged by other prompts of the category. OUT gets drawbench.png,
    index.html (every picture with its verdicts, the worst first), pictures/ and results.json. It
    must be new or empty.
    """

    out: Path
    """The folder to write."""
    prompts: int = 40
    """Prompts of each category, 2 or more."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels (64, 256 or 1024)."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by stage; 1 is none."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage, as `cascade sample --guidance-plan`."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""


def draw_prompts(options: PromptsOptions) -> dict[str, Any] | None:
    """Do `cascade eval prompts`: fill options.out, and return what goes to stdout."""
    from cascade.evaluation import prompt_runs, prompt_sets
    from cascade.runner import output

    if not options.files:
        raise UserError(f"no file of prompts is given; give one. {prompt_sets.SOURCES}")
    if options.batch is not None and not 1 <= options.batch <= 4096:
        raise UserError(f"--batch {options.batch}: must be 1 to 4096")
    if not 1 <= options.samples <= prompt_runs.SEEDS_APART:
        raise UserError(
            f"--samples {options.samples}: must be 1 to {prompt_runs.SEEDS_APART}; draw more with "
            "another --seed into another --out"
        )
    folder = output.folder_of(options.out)
    if not isinstance(folder, Path):
        raise UserError(f"--out {options.out}: must be a folder of this machine")
    files = prompt_sets.read(
        options.files,
        prompt_column=options.prompt_column,
        category_column=options.category_column,
    )
    prompt_runs.check_layout(options.layout, files)
    count = sum(len(file.prompts) for file in files)
    last = options.seed + prompt_runs.SEEDS_APART * (count - 1) + options.samples - 1
    if options.seed < 0 or last >= 2**32:
        raise UserError(
            f"--seed {options.seed}: must be 0 or more, and the last picture's, {last}, below 2^32"
        )
    for file in files:
        if file.empty:
            lines = ", ".join(map(str, file.empty[:10])) + ", ..." * (len(file.empty) > 10)
            warnings.warn(f"{file.path}: no prompt in line {lines}; passed over", stacklevel=1)
    with processes(options.compilation_cache):
        return _draw(options, files, folder)


def _draw(options: PromptsOptions, files: Sequence[PromptFile], folder: Path) -> Any:
    from cascade.evaluation import prompt_runs
    from cascade.runner.cascade import default_batch_size

    drawer = drawer_of(
        options,
        guidance=options.guidance,
        guidance_plan=options.guidance_plan,
        aug_level=options.aug_level,
        until=options.until,
    )
    run = prompt_runs.PromptRun(
        drawer=drawer,
        files=files,
        folder=folder,
        samples=options.samples,
        seed=options.seed,
        until=options.until,
        settings=described(options, drawer)["settings"],
    )
    with prompt_runs.opened(run):
        run.warn()
        batch, there = options.batch or default_batch_size(), run.drawn()
        own = run.own(batch)
        done = len(set(own).intersection(there))
        with drawing(len(own), done) as advance:
            run.draw(batch, advance)
        if not is_first():
            return None
        laid = prompt_runs.write_layout(run, options.layout)
    return {
        "folder": str(folder),
        "layout": None if laid is None else str(laid),
        "prompts": len(run.prompts),
        "pictures": len(run.prompts) * options.samples,
        "drawn_before": len(there),
        "categories": run.counts,
        **run.about(),
    }


def drawbench(options: DrawbenchOptions) -> dict[str, Any]:
    """Do `cascade eval drawbench`: fill options.out, and return what goes to stdout."""
    check(options, "--prompts", options.prompts, least=2)
    from cascade.evaluation import drawbench as asking
    from cascade.storage.paths import WholeFolder

    with WholeFolder(options.out) as folder:
        drawer = drawer_of(
            options,
            guidance=options.guidance,
            guidance_plan=options.guidance_plan,
            aug_level=options.aug_level,
            until=options.until,
        )
        with progress(len(asking.GROUPS) * options.prompts) as advance, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rare words, which are what is asked
            results, pictures = asking.evaluate_drawbench(
                drawer,
                folder,
                prompts=options.prompts,
                seed=options.seed,
                until=options.until,
                advance=advance,
            )
        report = {**described(options, drawer), "prompts": options.prompts, "categories": results}
        write(folder, {**report, "pictures": pictures})
    print(asking.table(results), file=sys.stderr)
    return report


COMMANDS = {
    "prompts": (PromptsOptions, draw_prompts, "draw a set of prompts, such as DrawBench"),
    "drawbench": (DrawbenchOptions, drawbench, "DrawBench's questions on scenes, by category"),
}
"""What is measured -> its options, what does it, and its line of help."""
