"""Sets of prompts drawn into a folder, which may be stopped at any time and goes on where it was.

    run.json  0000_64.png  0000_256.png  0000.json  0001_64.png ...  index.html
    geneval/00000/metadata.jsonl  geneval/00000/samples/0000.png     what GenEval evaluates
    geneval2/image_paths.json                                        what GenEval 2 does
    t2i-compbench/samples/PROMPT_000000.png                          what T2I-CompBench does

Pictures are as `cascade sample` writes them; picture i of prompt p, counted from 0, has the number
p * samples + i and the seed `seed` + SEEDS_APART * p + i. A picture is whole when its JSON, which
comes last, is there. Pictures are drawn in batches that begin at the same numbers however often a
run is stopped, so that the files come out the same byte for byte. Several processes draw batches p,
p + n, p + 2 n, ... each, into a folder that all see; the first one holds it and writes the page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from cascade.devices import distributed
from cascade.errors import UserError
from cascade.evaluation import prompt_page
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.prompt_sets import Prompt, PromptFile
from cascade.runner import cascade, output
from cascade.storage import lock, paths

Layout = Literal["cascade", "geneval", "geneval2", "t2i-compbench"]

SEEDS_APART = 1000
"""The seeds of a prompt's first picture and of the next prompt's are so far apart: so many pictures
of a prompt have seeds of their own."""
PAGE_EVERY, PAGES = 100, 20
"""The page is written anew after so many pictures, but of a large set only so many times, and at
the end."""
_NAMES_ONLY = ("model", "file")
"""What run.json says for people: a model or a file may have come to another place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRun:
    """Prompts, a model with its settings, and the folder that they are drawn into."""

    drawer: Drawer
    """The model and the settings of the stages that draw."""
    files: Sequence[PromptFile]
    """The set of prompts."""
    folder: Path
    """Where the pictures are and come to."""
    samples: int
    """The pictures of each prompt, 1 to SEEDS_APART."""
    seed: int
    """The seed of the first prompt's first picture."""
    until: int | None = None
    """The side in pixels of the last stage that draws; None draws with all."""
    settings: Mapping[str, Any]
    """The settings of the stages that draw, as JSON values, for run.json."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all files, in order."""
        return [prompt for file in self.files for prompt in file.prompts]

    @property
    def sides(self) -> list[int]:
        """The sides in pixels that are drawn, smallest first."""
        stages = self.drawer.cascade.select(until=self.until)
        return [stage.config.resolution for stage, _ in stages]

    @property
    def counts(self) -> dict[str, int]:
        """Category -> prompts in it, in the order in which they come; those without have ""."""
        return dict(Counter(prompt.category or "" for prompt in self.prompts))

    def seed_of(self, number: int) -> int:
        """The seed of the picture of that number."""
        prompt, sample = divmod(number, self.samples)
        return self.seed + SEEDS_APART * prompt + sample

    def drawn(self) -> list[int]:
        """The numbers of the pictures that are whole, in order."""
        names = {entry.name for entry in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [n for n in range(len(self.prompts) * self.samples) if self._files(n) <= names]

    def own(self, batch_size: int) -> list[int]:
        """The numbers of the pictures that this process draws, in order."""
        total, share = len(self.prompts) * self.samples, (jax.process_index(), jax.process_count())
        return list(cascade.numbers(total, batch_size, share))

    def draw(self, batch_size: int, advance: Callable[[], Any] = lambda: None) -> None:
        """Draw the pictures that are not there, and write the page, also when this is ended early.

        All processes of the program call it, draw a share each, and wait for each other. advance:
        called after each picture.
        """
        prompts, own = self.prompts, self.own(batch_size)
        missing = set(own).difference(self.drawn())
        written, every = 0, max(PAGE_EVERY, -(-len(own) // PAGES))
        self.write_page()
        try:
            for start in range(0, len(own), batch_size):
                batch = own[start : start + batch_size]
                if missing.isdisjoint(batch):
                    continue
                for number, picture in zip(batch, self._pictures(batch, batch_size), strict=True):
                    if number not in missing:
                        continue
                    prompt = prompts[number // self.samples]
                    (self.folder / f"{number:04d}.json").unlink(missing_ok=True)
                    record = {"category": prompt.category, "of_set": dict(prompt.fields)}
                    output.write(picture, self.folder, number, record)
                    written += 1
                    advance()
                    if written % every == 0:
                        self.write_page()
            distributed.wait(f"pictures {self.folder}")
        finally:
            self.write_page()

    def write_page(self) -> None:
        """Write index.html about the pictures that are there; the first process alone does it."""
        if jax.process_index() > 0:
            return
        prompts = self.prompts
        shown: dict[int, list[prompt_page.Shown]] = {}
        for number in self.drawn():
            files = {side: f"{number:04d}_{side}.png" for side in self.sides}
            one = prompt_page.Shown(name=f"{number:04d}", seed=self.seed_of(number), files=files)
            shown.setdefault(number // self.samples, []).append(one)
        prompt_page.write(
            self.folder / "index.html",
            prompts,
            [shown.get(i, []) for i in range(len(prompts))],
            about=self.about(),
            samples=self.samples,
        )

    def about(self) -> dict[str, Any]:
        """All that decides the pictures, as JSON values: what run.json holds."""
        return {
            "files": [
                {"file": str(file.path), "sha256": file.sha256, "prompts": len(file.prompts)}
                for file in self.files
            ],
            "prompts_sha256": _digest(self.prompts),
            "model": self.drawer.cascade.name,
            "model_sha256": self.drawer.cascade.digest,
            "samples": self.samples,
            "seed": self.seed,
            "until": self.sides[-1],
            "settings": dict(self.settings),
        }

    def _files(self, number: int) -> set[str]:
        pictures = {f"{number:04d}_{side}.png" for side in self.sides}
        return pictures | {f"{number:04d}.json"}

    def _pictures(self, batch: Sequence[int], batch_size: int) -> Iterator[Any]:
        """The pictures of a batch, which is filled up to its size: one program draws them all."""
        prompts = self.prompts
        filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `warn` has told of the prompts
            drawn = self.drawer.cascade.draw(
                [prompts[number // self.samples].text for number in filled],
                seed=[self.seed_of(number) for number in filled],
                until=self.until,
                settings=list(self.drawer.settings.values()),
                batch_size=batch_size,
            )
        yield from (picture for _, picture in zip(batch, drawn, strict=False))

    def warn(self) -> None:
        """Warn of prompts that have words which no caption of the model's had, or more tokens than
        it reads: how many there are, for drawing would tell of each. The first process does it."""
        if jax.process_index() > 0:
            return
        model, prompts = self.drawer.cascade, self.prompts
        unknown = [words for p in prompts if (words := model.unknown_words(p.text))]
        if unknown:
            words = [word for word, _ in Counter(w for own in unknown for w in own).most_common(5)]
            warnings.warn(
                f"{len(unknown)} of {len(prompts)} prompts have words that are not in the captions "
                f"that {model.name} was trained on, such as {', '.join(words)}",
                stacklevel=2,
            )
        for encoder in (model.encoder, *model.own_encoders.values()):
            if encoder is None:
                continue
            cut = encoder.tokenize([p.text for p in prompts]).truncated
            if cut is not None and cut.any():
                warnings.warn(
                    f"{int(cut.sum())} of {len(prompts)} prompts are longer than "
                    f"{encoder.max_tokens} tokens; what comes after them is not seen",
                    stacklevel=2,
                )


@contextlib.contextmanager
def opened(run: PromptRun) -> Iterator[None]:
    """While entered, the folder is this run's: new, empty, or begun by the same run before.

    What a killed process had begun to write is removed. All processes of the program enter it, and
    the first one holds the folder. Raises UserError for a folder that holds something else, that is
    of a run with other prompts, model or settings (naming what differs), or that another program is
    drawing into; and for processes that were given different ones.
    """
    about = run.about()
    told = {name: value for name, value in about.items() if name not in ("files", *_NAMES_ONLY)}
    distributed.agree({"set of prompts, model or settings": json.dumps(told)})
    with contextlib.ExitStack() as stack:
        distributed.all_or_none(lambda: _begin(run.folder, about, stack))
        yield


def _begin(folder: Path, about: Mapping[str, Any], stack: contextlib.ExitStack) -> None:
    if folder.is_dir() and not (folder / "run.json").exists():
        others = [p.name for p in folder.iterdir() if not _is_of_the_killed(p.name)]
        if others:
            raise UserError(
                f"--out {folder}: holds {min(others)}, and no run.json of a set of prompts; name a "
                "new or empty folder"
            )
    paths.make_folder(folder)
    held = lock.Lock(folder, held_by="another drawing", way_out="name another --out")
    stack.enter_context(held)
    if (folder / "run.json").exists():
        check_same(folder, about)
    else:
        paths.write_json(folder / "run.json", about)
    for entry in folder.iterdir():
        if re.fullmatch(r"\..*\.partial", entry.name):
            entry.unlink()


def check_same(folder: Path, now: Mapping[str, Any]) -> None:
    """Raise UserError that names what differs, unless the run.json of a folder says what is `now`.

    now: JSON values, as of `PromptRun.about`; the names of models and files may differ.
    """
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"--out {folder}: its run.json is not readable as JSON ({e}); name another folder"
        ) from None
    was, new = (dict(_leaves(value)) for value in (before, json.loads(json.dumps(now))))
    differing = [
        f"{name} was {json.dumps(was.get(name))} and is {json.dumps(new.get(name))} now"
        for name in dict.fromkeys([*new, *was])
        if was.get(name) != new.get(name) and name.rpartition(".")[2] not in _NAMES_ONLY
    ]
    if was.get("until") != new.get("until"):  # what one alone draws has no other settings
        differing = [said for said in differing if not said.startswith("settings.")]
    if differing:
        raise UserError(
            f"--out {folder}: was begun by another run: {'; '.join(differing[:3])}; give what it "
            "was begun with, or name another folder"
        )


def check_layout(layout: Layout, files: Sequence[PromptFile]) -> None:
    """Raise UserError where the prompts cannot be laid out so."""
    for file in files:
        if layout == "geneval" and file.format != "JSON lines":
            raise UserError(
                f"--layout geneval: {file.path} is {file.format}; GenEval evaluates by the lines "
                "of a JSON lines file such as its own evaluation_metadata.jsonl"
            )
        if layout == "t2i-compbench":
            for prompt in file.prompts:
                name = f"{prompt.text}_000000.png"
                if "/" in name or len(name.encode()) > 250 or "_" in prompt.text:
                    raise UserError(
                        f"--layout t2i-compbench: {prompt.where}: the prompt becomes the name of a "
                        "file, and may have no / or _ and at most 239 bytes; shorten it or leave "
                        "the layout out"
                    )


def write_layout(run: PromptRun, layout: Layout) -> Path | None:
    """Write what another evaluation reads into a folder of that name inside of the run's.

    Its pictures are the largest ones, as links that cannot be told from files (copies where the
    disk has no links). Returns that folder; None for "cascade", which is what is there anyway.
    """
    if layout == "cascade":
        return None
    folder, side = run.folder / layout, run.sides[-1]
    prompts, total = run.prompts, len(run.prompts) * run.samples
    if layout == "geneval2":
        firsts = {
            prompt.text: str((run.folder / f"{i * run.samples:04d}_{side}.png").absolute())
            for i, prompt in enumerate(prompts)
        }
        paths.make_folder(folder)
        paths.write_json(folder / "image_paths.json", firsts)
        return folder
    for number in range(total):
        place, sample = divmod(number, run.samples)
        if layout == "geneval":
            own = folder / f"{place:05d}"
            target = own / "samples" / f"{sample:04d}.png"
            if sample == 0:
                paths.make_folder(own)
                with paths.writing(own / "metadata.jsonl") as file:
                    file.write_text(f"{prompts[place].line}\n", encoding="utf-8")
        else:
            target = folder / "samples" / f"{prompts[place].text}_{number:06d}.png"
        paths.make_folder(target.parent)
        _link(run.folder / f"{number:04d}_{side}.png", target)
    return folder


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with paths.writing(target) as file:
            shutil.copyfile(source, file)


def _is_of_the_killed(name: str) -> bool:
    return name == lock.NAME or (name.startswith(".") and name.endswith(".partial"))


def _digest(prompts: Sequence[Prompt]) -> str:
    import hashlib

    told = [[prompt.text, prompt.category, dict(prompt.fields)] for prompt in prompts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(names with dots, value) of all that is no object and no list."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
