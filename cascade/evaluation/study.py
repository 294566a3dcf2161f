"""A blind study of two runs: which pictures stand side by side, and the key that tells whose.

Raters see a page (`study_page`) that has two pictures for each prompt and does not say which run
drew which; the key is a file of its own, and `preference` joins the answers with it. The design is
that of the comparisons on DrawBench in Saharia et al. 2022 ("Imagen", sec. 3 and 4.3), but that
one picture of each system is shown, not eight.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cascade import images
from cascade.config import read_json
from cascade.errors import UserError
from cascade.evaluation import study_page
from cascade.storage import paths

MOST_BYTES = 100_000_000
"""A page has at most so many bytes; browsers become slow with more, and mail refuses it long
before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture of a run, at all its sizes."""

    prompt: str
    """What it was to show."""
    category: str | None
    """The category of the prompt, as DrawBench has them; None is none."""
    about: paths.Path
    """Its JSON file, NUMBER.json."""
    files: Mapping[int, paths.Path]
    """Side in pixels -> its PNG."""
    digest: bytes
    """A hash of what its JSON file holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures of one prompt."""

    a: Drawn
    """The picture of run A."""
    b: Drawn
    """The picture of run B."""

    @property
    def prompt(self) -> str:
        return self.a.prompt

    @property
    def category(self) -> str | None:
        """The category that either of the two has."""
        return self.a.category or self.b.category


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A pair at its place in the study."""

    pair: Pair
    """The two pictures."""
    left: str
    """The run whose picture stands on the left, "a" or "b"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What of two runs has no counterpart in the other."""

    prompts_of_a: int
    """The number of prompts that run A alone has."""
    prompts_of_b: int
    """The number of prompts that run B alone has."""
    pictures: int
    """The number of pictures, of prompts that both have, that one run has more than the other."""


def read_run(folder: paths.Path) -> list[Drawn]:
    """The pictures of a folder that `cascade sample` has written, in the order of their numbers.

    A picture whose JSON file is missing was not finished, and is passed over. Raises UserError for
    a folder that is missing or has no picture, a JSON file that names no prompt, and a link that
    leads out of the folder.
    """
    if not folder.is_dir():
        raise UserError(f"run {folder}: no such folder; give one that `cascade sample` has written")
    sides: dict[str, dict[int, paths.Path]] = collections.defaultdict(dict)
    names = {file.name for file in folder.iterdir()}
    for name in names:
        if found := re.fullmatch(r"(\d{4,})_(\d{1,6})\.png", name):
            sides[found[1]][int(found[2])] = folder / name
    numbers = sorted((n for n in sides if f"{n}.json" in names), key=lambda n: (int(n), n))
    if not numbers:
        raise UserError(
            f"run {folder}: holds no picture of `cascade sample` (as 0000_64.png and 0000.json); "
            "give a folder that it has written"
        )
    return [_drawn(folder, folder / f"{n}.json", sides[n]) for n in numbers]


def _drawn(folder: paths.Path, about: paths.Path, files: Mapping[int, paths.Path]) -> Drawn:
    for file in (about, *files.values()):
        _check_within(folder, file)
    record = read_json(about)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{about}: has no "prompt" with a text; such a picture cannot be paired')
    category = record.get("category")
    if category is not None and not isinstance(category, str):
        raise UserError(f'{about}: "category" must be a text, got {str(category)[:80]}')
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
    return Drawn(
        prompt=prompt.strip(), category=category or None, about=about, files=files, digest=digest
    )


def _check_within(folder: paths.Path, file: paths.Path) -> None:
    if not isinstance(file, pathlib.Path) or not file.is_symlink():
        return
    try:
        inside = file.resolve().is_relative_to(pathlib.Path(folder).resolve())
    except (OSError, RuntimeError):  # a link to itself leads nowhere
        inside = False
    if not inside:
        raise UserError(f"{file}: is a link that leads outside the folder; copy the file there")


def pair_up(
    a: Sequence[Drawn], b: Sequence[Drawn], called: tuple[str, str]
) -> tuple[list[Pair], LeftOut]:
    """Pair the pictures of two runs by prompt, and by their order among those of the same prompt.

    called: what the runs are called in errors. Raises UserError where no prompt is in both, and
    where the two pictures of a pair are of different categories.
    """
    by_a, by_b = _by_prompt(a), _by_prompt(b)
    pairs = []
    for prompt, own in by_a.items():
        for one, other in zip(own, by_b.get(prompt, ()), strict=False):
            if one.category and other.category and one.category != other.category:
                raise UserError(
                    f"{one.about} and {other.about}: one prompt, but of the categories "
                    f"{one.category!r} and {other.category!r}; correct one of the files"
                )
            pairs.append(Pair(a=one, b=other))
    if not pairs:
        raise UserError(
            f"runs {called[0]} and {called[1]}: have no prompt in common; the first has "
            f"{a[0].prompt!r:.200}, the second {b[0].prompt!r:.200}; draw the same prompts with "
            "both models"
        )
    common = by_a.keys() & by_b.keys()
    left_out = LeftOut(
        prompts_of_a=len(by_a) - len(common),
        prompts_of_b=len(by_b) - len(common),
        pictures=sum(abs(len(by_a[prompt]) - len(by_b[prompt])) for prompt in common),
    )
    return pairs, left_out


def _by_prompt(run: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    found: dict[str, list[Drawn]] = collections.defaultdict(list)
    for one in run:
        found[one.prompt].append(one)
    return dict(found)


def side_of(pairs: Sequence[Pair], side: int | None) -> int:
    """The side, in pixels, at which the pairs are shown; None asks for the largest that all have.

    Raises UserError if a picture lacks it, or no side is common to all.
    """
    drawn = [one for pair in pairs for one in (pair.a, pair.b)]
    common = set.intersection(*(set(one.files) for one in drawn))
    if side is None and not common:
        few = min(drawn, key=lambda one: len(one.files))
        other = next((o for o in drawn if not set(o.files) & set(few.files)), drawn[-1])
        raise UserError(
            f"{few.about}: is there at {_sides(few)} px, {other.about} at {_sides(other)} px, and "
            "no side is common to all pictures; draw both runs alike"
        )
    if side is not None and side not in common:
        lacking = next(one for one in drawn if side not in one.files)
        told = ", ".join(map(str, sorted(common)))
        way_out = f"all pictures have {told}" if common else "no side is common to all pictures"
        raise UserError(
            f"--side {side}: {lacking.about} is there at {_sides(lacking)} px only; {way_out}"
        )
    return max(common) if side is None else side


def _sides(one: Drawn) -> str:
    return ", ".join(map(str, sorted(one.files)))


def places(pairs: Sequence[Pair], *, seed: int, count: int | None = None) -> list[Placed]:
    """Choose `count` pairs (None: all), their order, and which run stands on the left of each.

    All of it is chance, from the seed and from what the runs' JSON files hold: raters have not seen
    those files, and the sides of one study tell nothing of another's. The chosen pairs are as
    many of each category as can be, and of as many prompts. Either run stands on the left in half
    of all pairs, and of each category's, but for one. Raises UserError if there are not so many.
    """
    if count is not None and count > len(pairs):
        raise UserError(
            f"--pairs {count}: the two runs have {len(pairs)} pairs in common; give at most that, "
            "or leave it out for all"
        )
    digests = [one.digest for pair in pairs for one in (pair.a, pair.b)]
    rng = np.random.default_rng(int.from_bytes(_hash("places", seed, *digests), "big"))
    by_category: dict[str | None, list[Pair]] = collections.defaultdict(list)
    for i in rng.permutation(len(pairs)):
        by_category[pairs[i].category].append(pairs[i])
    queues = [_prompts_in_turn(queue) for queue in by_category.values()]
    shares: list[list[Pair]] = [[] for _ in queues]
    for _ in range(len(pairs) if count is None else count):
        # The category that has the fewest so far; of equal ones, the first in a chance order.
        open_ones = [i for i, queue in enumerate(queues) if len(shares[i]) < len(queue)]
        least = min(open_ones, key=lambda i: len(shares[i]))
        shares[least].append(queues[least][len(shares[least])])
    first = int(rng.integers(2))
    placed = [
        Placed(pair=pair, left="ab"[(first + i) % 2])
        for i, pair in enumerate(pair for share in shares for pair in share)
    ]
    return [placed[i] for i in rng.permutation(len(placed))]


def _prompts_in_turn(queue: Sequence[Pair]) -> list[Pair]:
    """One pair of each prompt first, then a second one of those that have it, and so on."""
    before: dict[str, int] = collections.defaultdict(int)
    ranked = []
    for pair in queue:
        ranked.append((before[pair.prompt], pair))
        before[pair.prompt] += 1
    return [pair for _, pair in sorted(ranked, key=lambda one: one[0])]


def write(
    page: paths.Path,
    key: paths.Path,
    placed: Sequence[Placed],
    *,
    side: int,
    seed: int,
    runs: tuple[str, str],
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Write the page and its key; both appear whole, and the page not before its key.

    Pictures are decoded and written anew, so that the page has their pixels alone: the files of
    `cascade sample` hold prompts, seeds and more as text. runs: what the key calls A and B.
    advance: called after each picture. Returns the key: {"study", "seed", "side", "runs": {"a",
    "b"}, "pairs": [{"pair", "prompt", "category", "left", "a", "b"}]}, the last two being names of
    files. Raises UserError for a picture that cannot be read, two of a pair that are of different
    shapes, and a page of more than MOST_BYTES.
    """
    shown, total = [], 0
    for number, one in enumerate(placed, 1):
        a, b = (_pixels(drawn.files[side]) for drawn in (one.pair.a, one.pair.b))
        if a.size != b.size:
            raise UserError(
                f"{one.pair.a.files[side]} has {a.width} x {a.height} pixels, "
                f"{one.pair.b.files[side]} {b.width} x {b.height}: pictures of different shapes "
                "cannot be compared blindly; draw both alike"
            )
        encoded = {}
        for name, picture in (("a", a), ("b", b)):
            encoded[name] = _png(picture)
            advance()
        left, right = (encoded[name] for name in (one.left, _other(one.left)))
        shown.append(study_page.Shown(prompt=one.pair.prompt, left=left, right=right))
        total += 4 * (len(left) + len(right)) // 3
        if total > MOST_BYTES:
            fewer = f"--pairs {number - 1}" if number > 1 else ""
            smaller = [s for s in sorted(one.pair.a.files) if s < side and s in one.pair.b.files]
            ways = [way for way in (fewer, f"--side {smaller[-1]}" if smaller else "") if way]
            raise UserError(
                f"the page would have more than {MOST_BYTES // 10**6} MB: {number} of "
                f"{len(placed)} pairs at {side} px are as much; "
                + (f"give {' or '.join(ways)}" if ways else "draw smaller pictures")
            )
    digests = [_hash(one.prompt, one.left, one.right) for one in shown]
    study = _hash("study", seed, *digests).hex()[:16]
    record = {
        "study": study,
        "seed": seed,
        "side": side,
        "runs": {"a": runs[0], "b": runs[1]},
        "pairs": [
            {
                "pair": number,
                "prompt": one.pair.prompt,
                "category": one.pair.category,
                "left": one.left,
                "a": one.pair.a.files[side].name,
                "b": one.pair.b.files[side].name,
            }
            for number, one in enumerate(placed, 1)
        ],
    }
    for name in (page, key):
        paths.make_folder(name.parent)
    with paths.writing(page) as file:
        study_page.write(file, study, shown)
        with paths.writing(key) as of_key:
            text = json.dumps(record, indent=2) + "\n"
            of_key.write_text(text, encoding="utf-8")
    return record


def _other(run: str) -> str:
    return {"a": "b", "b": "a"}[run]


def _pixels(file: paths.Path) -> Any:
    """The picture in RGB, of which nothing but the pixels is left."""
    from PIL import Image

    return Image.fromarray(np.asarray(images.load_image(file)))


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _hash(*parts: Any) -> bytes:
    """A hash of texts, numbers and bytes, each with its length, so that none runs into the next."""
    found = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.digest()
