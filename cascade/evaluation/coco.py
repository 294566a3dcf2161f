"""The zero-shot COCO protocol: pictures of captions of MS COCO's val2014 beside its photographs.

    captions.jsonl  run.json  guidance-1.35/0000_64.png ...  unfinished/
    results.json  sheet.png  pareto.png  pareto.csv

30,000 captions are drawn at random from all of val2014, a picture of each is drawn at 256 px by a
model that was not trained on COCO, and FID is taken beside all 40,504 photographs of val2014,
cropped to their central squares and resized to 256 px (Ramesh et al. 2021; GLIDE, Nichol et al.
2022, sec. 4; DALL-E 2, Ramesh et al. 2022, sec. 5; Imagen, Saharia et al. 2022, sec. 4.1, with the
curves of FID and CLIP score over guidance weights in figures 4a and A.11).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cascade import config
from cascade.data.pictures import Found, PictureData, PictureSource
from cascade.data.samples import SamplesData
from cascade.devices import distributed
from cascade.errors import UserError
from cascade.evaluation import (
    clip_score,
    coco_report,
    distances,
    features,
    fid,
    prompt_runs,
    prompt_sets,
    resumable,
)
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.prompt_runs import PromptRun
from cascade.evaluation.prompt_sets import PromptFile
from cascade.published.clip import CLIP
from cascade.storage import lock, paths

PROMPTS, PICTURES, SIDE = 30_000, 40_504, 256
"""What published values are of: captions drawn, pictures of val2014, pixels of a side."""
DRAW = "captions.jsonl"
"""The file of the captions that are drawn, in their order."""
MOST_BYTES = 2**28
"""A file of captions has at most so many bytes; val2014's has a ninth of them."""
SOURCES = (
    "captions_val2014.json is in annotations_trainval2014.zip, and the pictures "
    "COCO_val2014_*.jpg are in val2014.zip; people download both at cocodataset.org/#download"
)
"""Where people get the files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """One caption of a picture."""

    id: int
    """Its number in the file, which no other has."""
    image_id: int
    """The number of the picture that it is about."""
    caption: str
    """The caption, without white space around it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """What a file of COCO's captions says."""

    path: paths.Path
    """The file."""
    sha256: str
    """The SHA-256 of its bytes, in hexadecimal."""
    files: Mapping[int, str]
    """The number of a picture -> the name of its file, in the order of the numbers."""
    annotations: tuple[Annotation, ...]
    """All captions that have a word, in the order of their numbers."""


def read(name: Path) -> Captions:
    """Read captions_val2014.json, or a file like it.

    Raises UserError for a file that is missing or cut, or has anything but pictures and captions.
    """
    file = paths.path(name)
    paths.check_regular(file)
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file. {SOURCES}") from None
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; give captions_val2014.json") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{file}: has more than {MOST_BYTES} bytes; give captions_val2014.json")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{file}: not readable as JSON ({e!s:.200}); it may be cut: unpack it again"
        ) from None
    files: dict[int, str] = {}
    for image in _list(file, value, "images", id=int, file_name=str):
        if image["id"] in files:
            raise UserError(f"{file}: two images have the id {image['id']}; unpack it again")
        files[image["id"]] = image["file_name"]
    found: dict[int, Annotation] = {}
    for one in _list(file, value, "annotations", id=int, image_id=int, caption=str):
        if one["id"] in found:
            raise UserError(f"{file}: two annotations have the id {one['id']}; unpack it again")
        if one["image_id"] not in files:
            raise UserError(
                f"{file}: annotation {one['id']} is about image {one['image_id']}, which is not "
                "among the images; unpack it again"
            )
        names = {name: one[name] for name in ("id", "image_id")}
        found[one["id"]] = Annotation(**names, caption=one["caption"].strip())
    annotations = tuple(found[i] for i in sorted(found) if found[i].caption)
    if not annotations:
        raise UserError(f"{file}: has no caption; give captions_val2014.json")
    return Captions(
        path=file,
        sha256=hashlib.sha256(content).hexdigest(),
        files={i: files[i] for i in sorted(files)},
        annotations=annotations,
    )


def _list(file: paths.Path, value: Any, name: str, **types: type) -> Iterator[dict[str, Any]]:
    """The objects of a list, which have values of these types."""
    how = "give captions_val2014.json, which has image_id, id and caption of each annotation"
    rows = value.get(name) if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{file}: has no list {name!r}; {how}")
    for i, row in enumerate(rows):
        for key, kind in types.items():
            one = row.get(key) if isinstance(row, dict) else None
            if type(one) is not kind or not _is_text(one):
                words = "a whole number" if kind is int else "a text"
                said = f"{json.dumps(one):.80}"
                raise UserError(f"{file}: {name}[{i}].{key} must be {words}, got {said}; {how}")
        yield row


def _is_text(value: Any) -> bool:
    """Whether a text, if it is one, is such that files can hold."""
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text
        return False
    return "\0" not in value


def draw(captions: Captions, prompts: int, seed: int) -> list[Annotation]:
    """So many captions of the file at random, none twice, each as likely as any other.

    Those of fewer prompts are the first of those of more. Raises UserError where there are not so
    many.
    """
    if prompts > len(captions.annotations):
        raise UserError(
            f"--prompts {prompts}: {captions.path} has {len(captions.annotations)} captions; give "
            "no more than these"
        )
    order = np.random.default_rng(seed).permutation(len(captions.annotations))
    return [captions.annotations[i] for i in order[:prompts]]


class TruePictures(PictureSource):
    """The pictures that a file of captions names, with all captions of each."""

    def __init__(self, captions: Captions, folder: Path, side: int):
        """side: what their central squares are resized to, in pixels, antialiased. Raises UserError
        where one is missing in the folder."""
        super().__init__(PictureData(), side)
        self._folder = paths.path(folder)
        if not self._folder.is_dir():
            raise UserError(f"--pictures {self._folder}: no such folder. {SOURCES}")
        there = {entry.name for entry in self._folder.iterdir()}
        missing = [name for name in captions.files.values() if name not in there]
        if missing:
            count = len(captions.files)
            raise UserError(
                f"--pictures {self._folder}: holds {count - len(missing)} of the {count} pictures "
                f"that {captions.path} names, and {missing[0]!r:.80} is not there. {SOURCES}"
            )
        self._names = tuple(captions.files.values())
        self.places = {image: i for i, image in enumerate(captions.files)}
        texts: dict[int, list[str]] = {}
        for one in captions.annotations:
            texts.setdefault(one.image_id, []).append(one.caption)
        self._captions = [tuple(texts.get(image, ("",))) for image in captions.files]

    def __len__(self) -> int:
        return len(self._names)

    def found(self, index: int) -> Found:
        name = self._names[index]
        path = self._folder / name
        return Found(name, f"picture {path}", path, self._captions[index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Captions, a model with its settings, and the folder that they are drawn into."""

    folder: Path
    """Where all is written."""
    captions: Captions
    """What captions are drawn from."""
    prompts: int
    """How many of them are drawn."""
    seed: int
    """Chooses the captions; the picture of caption i has seed + 1000 i."""
    drawer: Drawer
    """The model and the settings of the stages that draw, up to `until`."""
    weights: Sequence[float]
    """The weights of the base stage's classifier-free guidance, each at most once."""
    until: int
    """The side in pixels of the last stage that draws."""

    def about(self) -> dict[str, Any]:
        """All that decides the pictures but the weights, as JSON values: what run.json holds."""
        base, *_ = self.drawer.settings
        settings = {name: config.to_json(s) for name, s in self.drawer.settings.items()}
        del settings[base]["guidance"]
        draw = self.folder / DRAW
        return {
            "captions": {"file": str(self.captions.path), "sha256": self.captions.sha256},
            "draw_sha256": hashlib.sha256(draw.read_bytes()).hexdigest(),
            "prompts": self.prompts,
            "seed": self.seed,
            "model": self.drawer.cascade.name,
            "model_sha256": self.drawer.cascade.digest,
            "until": self.until,
            "settings": settings,
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[float, PromptRun]]:
        """While entered, the folder is this program's: a run for each weight, ready to draw.

        The captions are those of captions.jsonl where that is in the folder, and are drawn and
        written there where it is not. All processes of the program enter it. Raises UserError for a
        folder that holds something else or is of another run, and for captions.jsonl that is not of
        this file, number and seed.
        """
        with contextlib.ExitStack() as stack:
            distributed.all_or_none(lambda: self._begin(stack))
            (file,) = prompt_sets.read([self.folder / DRAW], prompt_column="caption")
            runs = {weight: self._run(weight, file) for weight in self.weights}
            for run in runs.values():
                stack.enter_context(prompt_runs.opened(run))
            yield runs

    def _run(self, weight: float, file: PromptFile) -> PromptRun:
        base, *_ = self.drawer.settings
        drawer = self.drawer.replaced([base], guidance=weight)
        return PromptRun(
            drawer=drawer,
            files=[file],
            folder=self.folder / folder_name(weight),
            samples=1,
            seed=self.seed,
            until=self.until,
            settings={name: config.to_json(s) for name, s in drawer.settings.items()},
        )

    def _begin(self, stack: contextlib.ExitStack) -> None:
        folder, begun = self.folder, (self.folder / "run.json").exists()
        if folder.is_dir() and not begun:
            others = [p.name for p in folder.iterdir() if not _may_be_there(p.name)]
            if others:
                raise UserError(
                    f"--out {folder}: holds {min(others)}, and no run.json of `cascade eval coco`; "
                    "name a new or empty folder"
                )
        there = (folder / DRAW).exists()
        drawn = [] if there else self._lines(draw(self.captions, self.prompts, self.seed))
        paths.make_folder(folder)
        who = "another `cascade eval coco`"
        stack.enter_context(lock.Lock(folder, held_by=who, way_out="name another --out"))
        if not there:
            with paths.writing(folder / DRAW) as file:
                file.write_text("".join(drawn), encoding="utf-8")
        if begun:
            prompt_runs.check_same(folder, self.about())
        self._check_draw()
        if not begun:
            paths.write_json(folder / "run.json", self.about())
        for entry in folder.iterdir():
            if re.fullmatch(r"\..*\.partial", entry.name):
                entry.unlink()

    def _lines(self, drawn: Sequence[Annotation]) -> list[str]:
        rows = [
            {
                "annotation_id": one.id,
                "image_id": one.image_id,
                "caption": one.caption,
                "seed": self.seed + prompt_runs.SEEDS_APART * i,
            }
            for i, one in enumerate(drawn)
        ]
        return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]

    def _check_draw(self) -> None:
        """Raise UserError unless captions.jsonl holds captions of the file, each at most once, as
        `_lines` writes them."""
        path = self.folder / DRAW
        (file,) = prompt_sets.read([path], prompt_column="caption")
        how = "give those that it was drawn with, or name another --out"
        if len(file.prompts) != self.prompts or file.empty:
            raise UserError(
                f"{path}: has {len(file.prompts)} captions, and --prompts is {self.prompts}; give "
                "this number, or name another --out"
            )
        by_id = {one.id: one for one in self.captions.annotations}
        seen: set[Any] = set()
        for i, prompt in enumerate(file.prompts):
            one = prompt.fields.get("annotation_id")
            known = by_id.get(one) if type(one) is int else None
            expected = None if known is None else json.loads(self._lines([known])[0])
            if expected is not None:
                expected["seed"] += prompt_runs.SEEDS_APART * i
            if expected is None:
                raise UserError(f"{prompt.where}: is no annotation of the file of captions; {how}")
            if expected != {**prompt.fields, "caption": prompt.text}:
                raise UserError(
                    f"{prompt.where}: by the file of captions and --seed {self.seed} it must be "
                    f"{json.dumps(expected):.300}; {how}"
                )
            if one in seen:
                raise UserError(f"{prompt.where}: annotation {one} is drawn twice; {how}")
            seen.add(one)


def folder_name(weight: float) -> str:
    """The folder of a weight's pictures."""
    return f"guidance-{weight:g}"


def _may_be_there(name: str) -> bool:
    return name in (DRAW, lock.NAME) or (name.startswith(".") and name.endswith(".partial"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """The networks that compare pictures."""

    network: features.Features
    """What FID, KID, precision and recall are by."""
    clip: CLIP | None = None
    """What the CLIP score and the distance by CLIP's features are by; None for neither."""
    side: int = SIDE
    """What pictures are resized to before, in pixels."""
    batch: int = 32
    """Pictures that a network sees together."""

    def pictures(self, protocol: Protocol, true: fid.Pictures) -> int:
        """How many pictures this process lets networks see in `measure`."""
        own = features.own(protocol.prompts) * len(protocol.weights)
        if self.clip is None:
            return own + features.own(true.count)
        return own * (3 if true.source else 2) + features.own(true.count) * 2


def measure(
    protocol: Protocol,
    runs: Mapping[float, PromptRun],
    true: fid.Pictures,
    judges: Judges,
    advance: Callable[[int], Any] = lambda pictures: None,
) -> tuple[dict[str, Any], distances.Statistics] | None:
    """The figures of the pictures of every weight, as JSON values, and the true ones' statistics.

    All processes of the program call it when all pictures are drawn; the first one has what it
    returns. Features lie in the folder, where they are not made anew, until `finish`.
    """
    inside = protocol.folder / resumable.NAME
    with_clip = None if judges.clip is None else features.of_clip(judges.clip)
    every = {"folder": inside, "batch": judges.batch, "advance": advance}

    def seen(pictures: fid.Pictures, network: features.Features) -> fid.Seen:
        return fid.seen(pictures, network, **every)

    truth = seen(true, judges.network)
    by_clip = seen(true, with_clip) if with_clip and true.source else None
    found: list[tuple[fid.Seen, fid.Seen | None, clip_score.Scores | None]] = []
    for run in runs.values():
        data = SamplesData(path=str(run.folder))
        source = data.open(judges.side)
        drawn = fid.Pictures(
            name=str(run.folder),
            side=judges.side,
            data=data,
            source=source,
            count=protocol.prompts,
        )
        scores = None
        if judges.clip is not None and with_clip is not None:
            own = inside / "captions"
            place = features.place(own, with_clip, data, source, protocol.prompts)
            scores = clip_score.score(
                *(source, protocol.prompts, judges.clip, with_clip, place),
                batch=judges.batch,
                seed=protocol.seed,
                advance=advance,
            )
        drawn_by_clip = seen(drawn, with_clip) if with_clip and by_clip else None
        found.append((seen(drawn, judges.network), drawn_by_clip, scores))
    if jax.process_index() > 0:
        return None
    points = []
    for weight, (drawn, drawn_by_clip, scores) in zip(runs, found, strict=True):
        count = drawn.about["pictures"]
        point: dict[str, Any] = {
            "guidance": weight,
            "folder": folder_name(weight),
            "name": coco_report.name_of(judges.network.suffix, count),
            **{name: drawn.about[name] for name in ("pictures", "left_out")},
            **fid.compare(drawn, truth, judges.network, protocol.seed),
        }
        if drawn_by_clip and by_clip:
            point["fd_clip"] = distances.frechet(drawn_by_clip.statistics, by_clip.statistics)
        if scores is not None:
            told = scores.as_json()
            point |= {name: value for name, value in told.items() if name != "pictures"}
        points.append(point)
    report = {
        **protocol.about(),
        "network": judges.network.name,
        "weights_sha256": judges.network.digest,
        "clip": with_clip and with_clip.name,
        "clip_sha256": with_clip and with_clip.digest,
        "side": judges.side,
        "reference": truth.about,
        "points": points,
    }
    report["notes"] = notes(report, judges.network.suffix)
    return report, truth.statistics


def notes(report: Mapping[str, Any], suffix: str) -> list[str]:
    """What keeps the figures of a report from being compared with published ones, in sentences."""
    told, point = [], report["points"][0]
    name, count, true = point["name"], point["pictures"], report["reference"]["pictures"]
    if suffix:
        told.append(
            f"{name} is not FID: the features are those of {report['network']}, and the figures "
            "are for settings of one model beside each other"
        )
    if count != PROMPTS:
        told.append(
            f"{name} is of {count} pictures, and falls with more of them: it cannot be compared "
            f"with published values, which are of {PROMPTS} (FID-30K), but with others of {count} "
            "alone"
        )
    if true != PICTURES:
        told.append(
            f"the pictures are beside {true or 'an unknown number of'} true ones, and published "
            f"values are beside all {PICTURES} of val2014"
        )
    if report["side"] != SIDE:
        told.append(
            f"pictures are compared at {report['side']} px, and published values are of {SIDE} px"
        )
    return told


def finish(
    protocol: Protocol,
    runs: Mapping[float, PromptRun],
    true: fid.Pictures,
    report: Mapping[str, Any],
    side: int,
) -> None:
    """Write results.json, sheet.png and, of several weights, pareto.png and pareto.csv; remove the
    features. The first process alone calls it."""
    folder = protocol.folder
    drawn = {w: SamplesData(path=str(run.folder)).open(side) for w, run in runs.items()}
    prompts = next(iter(runs.values())).prompts
    truth: Any = true.source
    places = None if truth is None else [truth.places[p.fields["image_id"]] for p in prompts]
    coco_report.sheet(folder / "sheet.png", drawn, truth, places)
    coco_report.pareto(folder, report["points"])
    paths.write_json(folder / "results.json", report)
    shutil.rmtree(folder / resumable.NAME)
