"""Tar shards as WebDataset has them and img2dataset writes them, read at random.

A shard is gone through once when it is opened, from head to head of its members, and where each
picture, caption and JSON lies is kept in arrays of 40 bytes an example; names and captions stay
where they are. Members are only ever read as bytes: nothing is extracted, and no name is followed.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cascade.data.pictures import (
    MOST_CAPTION,
    MOST_PICTURE,
    Found,
    PictureData,
    PictureSource,
    caption_of,
    captions_in,
    told,
)
from cascade.data.source import BadRecord, Source, hashes_of
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarData(PictureData):
    """Tar shards of samples: 0001.jpg, 0001.txt and 0001.json, one after the other.

    A sample is the files in a row whose names are alike up to the first dot: a picture (jpg, jpeg,
    png, webp, gif, bmp, tif, tiff), its caption as UTF-8 text (txt), and perhaps a JSON object
    (json), whose entries are the columns that filters see. Shards are not compressed.
    """

    path: str
    """The shards: a file, a folder whose files *.tar are meant, or a name with numbers in braces
    as 'shards/{00000..00999}.tar', here or in object storage (gs://BUCKET/NAME,
    s3://BUCKET/NAME)."""
    caption_column: str | None = None
    """The entry of the JSON that is the caption, or a list of several; None is the text file."""
    index: str | None = None
    """A folder that keeps where the members of each shard lie, so that the next run need not go
    through the shards again; it is made if need be. None keeps nothing. Shards in object storage
    are read through, or nearly so, to find that out."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the shards; see `Data.open`."""
        return _TarSource(self, resolution)


def shards_of(path: str) -> list[Path]:
    """The shards that a name means. Raises UserError where there is none, or too many."""
    names = list(itertools.islice(_expanded(path), MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise UserError(f"{path}: names more than {MOST_SHARDS} shards; name fewer")
    found = [paths.path(name) for name in names]
    if len(found) == 1 and found[0].is_dir():
        found = sorted(file for file in found[0].iterdir() if file.name.endswith(".tar"))
        if not found:
            raise UserError(f"{path}: holds no shards (*.tar); name them, or their folder")
    return found


MOST_SHARDS = 10**6
"""How many shards a name may mean."""
MOST_JSON = 2**20
"""Bytes of the largest JSON of a sample that is read."""
_MOST_HEAD = 2**20
"""Bytes that may be read to come from one member of a shard to the next."""
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_MEMBERS = ("picture", "text", "json")
_PLACES = [(f"{m}_{of}", kind) for m in _MEMBERS for of, kind in (("at", "i8"), ("n", "i4"))]
_SAMPLE = np.dtype([*_PLACES, ("hash", "u4")])
"""Where the members of a sample lie, in bytes from the shard's beginning; 0 where there is none."""
_HEAD, _REST = slice(tarfile.BLOCKSIZE), slice(tarfile.BLOCKSIZE, None)
_VERSION = 2
"""An index is its SHA-256, a line of JSON, and the samples."""
_DIGEST = hashlib.sha256().digest_size


class _TarSource(PictureSource):
    def __init__(self, config: TarData, resolution: int):
        super().__init__(config, resolution)
        shards = shards_of(config.path)
        self.shards = [str(shard) for shard in shards]
        self.left_out, indexed = [], []
        filtered = collections.Counter[str]()
        shown = bar(iterable=shards, desc="index of shards", unit="shard", disable=len(shards) < 20)
        for number, shard in enumerate(shown):
            samples, bad = _indexed(shard, config.index)
            self.left_out += [BadRecord(f"{shard}: {key}: {why}", key, why) for key, why in bad]
            if config.filters.any and not paths.is_remote(shard):
                samples = self._passing(number, samples, filtered)
            indexed.append(samples)
        self._samples = np.concatenate(indexed)
        self._ends = np.cumsum([len(samples) for samples in indexed])
        self.filtered = +filtered
        told(self, f"shards {config.path}")

    def __len__(self) -> int:
        return len(self._samples)

    def hashes(self):
        return self._samples["hash"].copy()

    def found(self, index: int) -> Found:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._found(number, self._samples[index])

    def _found(self, number: int, sample: Any, pictures: bool = True) -> Found:
        """A sample of a shard; without its picture it has no name."""
        shard = paths.path(self.shards[number])
        spans = {name: (int(sample[f"{name}_at"]), int(sample[f"{name}_n"])) for name in _MEMBERS}
        at, size = spans.pop("picture")
        if pictures:
            spans["picture"] = at - tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE
        try:
            content = _parts(shard, {name: span for name, span in spans.items() if span[1]})
        except OSError as e:
            raise BadRecord(
                f"{shard}: cannot be read ({e.strerror or e})",
                *(f"{shard.name}, byte {at}", "unreadable shard"),
            ) from None
        head, picture = (content.get("picture", b"")[part] for part in (_HEAD, _REST))
        key = f"{shard.name}/{_name(head)}"
        where = f"{shard}: {key.partition('/')[2]}"
        values = _values(content.get("json", b"{}"))
        if self.config.caption_column is None:
            captions = (caption_of(content.get("text", b""), where, key),)
        elif values is None:
            raise BadRecord(f"{where}: its JSON is no object", key, "whose JSON is no object")
        else:
            captions = captions_in(values.get(self.config.caption_column), where, key)
        return Found(key, where, picture, captions, values or {})

    def _passing(
        self, number: int, samples: np.ndarray, filtered: collections.Counter[str]
    ) -> np.ndarray:
        """The samples of a shard that no filter takes out by what stands beside the picture."""
        kept = np.ones(len(samples), bool)
        filters = self.config.filters
        for row, sample in enumerate(samples):
            try:
                found = self._found(number, sample, pictures=False)
            except BadRecord:
                continue  # it is told when it is read
            reason = filters.passing(found.captions)[1] or filters.reason_of_values(found.values)
            filtered[reason] += bool(reason)
            kept[row] = not reason
        return samples[kept]


def _parts(shard: Path, spans: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The bytes (first, how many) of a shard, in one go where they lie beside one another."""
    if not spans:
        return {}
    start, end = min(at for at, _ in spans.values()), max(at + n for at, n in spans.values())
    if end - start > 2 * sum(n for _, n in spans.values()) + 2**16:
        return {name: paths.read_part(shard, *span) for name, span in spans.items()}
    whole = paths.read_part(shard, start, end - start)
    return {name: whole[at - start : at - start + n] for name, (at, n) in spans.items()}


def _name(head: bytes) -> str:
    """What a member is called in its head, up to the first dot after the last slash."""
    return _key(head[:100].partition(b"\0")[0].decode(errors="surrogateescape"))[0]


def _values(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# Going through a shard.


class _Index(NamedTuple):
    samples: np.ndarray
    bad: list[tuple[str, str]]


def _indexed(shard: Path, folder: str | None) -> _Index:
    """Where the samples of a shard lie, from the folder if it was noted there."""
    try:
        paths.check_regular(shard)
        size, changed = _stamp(shard)
    except OSError:
        raise UserError(
            f"shard {shard}: no such file; name a tar file, a folder of them, or several as "
            "'shards/{00000..00999}.tar'"
        ) from None
    kept = None
    if folder is not None:
        paths.make_folder(paths.path(folder))
        named = hashlib.sha256(str(shard).encode(errors="surrogateescape")).hexdigest()[:16]
        kept = paths.path(folder) / f"{named}.index"
        if (known := _read_index(kept, size, changed)) is not None:
            return known
    opened: Any
    with shard.open("rb") as opened:
        index = _gone_through(opened, size, str(shard))
    if kept is not None:
        head = json.dumps({"stamp": [_VERSION, size, changed], "bad": index.bad}).encode()
        body = head + b"\n" + index.samples.tobytes()
        with paths.writing(kept) as file, file.open("wb") as written:
            written.write(hashlib.sha256(body).digest() + body)
    return index


def _stamp(shard: Path) -> tuple[int, int]:
    """The shard's length in bytes and when it was written."""
    if paths.is_remote(shard):
        found: Any = shard.stat()
        return int(found.length), int(found.mtime or 0)
    found = shard.stat()
    return found.st_size, found.st_mtime_ns


def _read_index(file: Path, size: int, changed: int) -> _Index | None:
    """What was noted of a shard; None if nothing was, of another shard, or it is damaged."""
    try:
        paths.check_regular(file)
        with file.open("rb") as opened:
            content = opened.read(size + MOST_JSON + 1)
    except (OSError, UserError):
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        return None
    head, _, rest = body.partition(b"\n")
    try:
        noted = json.loads(head.decode())
        listed = [(str(key), str(why)) for key, why in noted["bad"]]
        samples = np.frombuffer(rest, _SAMPLE)
        if noted["stamp"] != [_VERSION, size, changed]:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    for name in _MEMBERS:
        at, n = samples[f"{name}_at"], samples[f"{name}_n"]
        least = tarfile.BLOCKSIZE if name == "picture" else 0  # the head before it is read too
        if ((at < least) | (at > size) | (n < 0) | (n > size - at)).any():
            return None
    return _Index(samples, listed)


def _gone_through(file: Any, size: int, shard: str) -> _Index:
    samples, bad = [], []
    key, members = "", {}
    for name, member in _members(file, size):
        if isinstance(member, str):
            bad.append((name, member))
            continue
        this, kind = _key(name)
        if this != key:
            _close(key, members, samples, bad)
            key, members = this, {}
        if kind in ("txt", "json", *_PICTURES):
            members.setdefault(kind, []).append(member)
    _close(key, members, samples, bad)
    if not samples and not bad:
        raise UserError(f"shard {shard}: holds no pictures; name tar files of pictures")
    return _Index(np.array(samples, _SAMPLE), bad)


def _close(key: str, members: dict[str, list[Any]], samples: list[Any], bad: list[Any]) -> None:
    """Note a sample that has come to its end."""
    if not members:
        return
    pictures = [span for kind in _PICTURES for span in members.get(kind, ())]
    texts, jsons = members.get("txt", []), members.get("json", [])
    if not pictures:
        why = "without a picture"
    elif len(pictures) > 1 or len(texts) > 1 or len(jsons) > 1:
        why = "with several files of one name and kind"
    elif not texts and not jsons:
        why = "without a caption"
    elif pictures[0][1] > MOST_PICTURE or pictures[0][1] < 1:
        why = f"whose picture has no bytes or more than {MOST_PICTURE}"
    elif texts and texts[0][1] > MOST_CAPTION:
        why = "whose caption is too long"
    elif jsons and jsons[0][1] > MOST_JSON:
        why = f"whose JSON has more than {MOST_JSON} bytes"
    else:
        text, other = (texts or [(0, 0)])[0], (jsons or [(0, 0)])[0]
        samples.append((*pictures[0], *text, *other, hashes_of([key])[0]))
        return
    bad.append((key, why))


def _members(file: Any, size: int) -> Iterator[tuple[str, tuple[int, int] | str]]:
    """The name of each file in a shard, and (first byte, bytes), or why it cannot be had."""
    limited = _Limited(file)
    seen = end = 0
    try:
        archive = tarfile.open(fileobj=limited, mode="r:")  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members = []  # which it would keep all of
            limited.left = _MOST_HEAD
            at, n = member.offset_data, member.size
            if n < 0 or archive.offset <= seen:
                raise tarfile.ReadError("a member that ends before it begins")
            seen, end = archive.offset, archive.offset
            if member.isdir():
                continue
            if not member.isreg() or member.sparse is not None:
                yield member.name, "that is a link, a device or full of holes"
            elif at + n > size:
                yield member.name, "that is cut off"
                return
            else:
                yield member.name, (at, n)
        end = archive.offset
        file.seek(min(end, size))
        # tarfile takes a damaged head for the end.
        if file.read(tarfile.BLOCKSIZE).strip(b"\0") or end > size:
            raise tarfile.ReadError("a damaged head")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError, LookupError):
        yield f"from byte {end}", "damaged rest of a shard (or it is compressed: unpack it)"


class _Limited:
    """A file of which little is read from one member to the next: a head need have no end."""

    def __init__(self, file: Any):
        self._file, self.left = file, _MOST_HEAD

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError("a head without an end")
        return self._file.read(size)

    def seek(self, at: int, whence: int = 0) -> int:
        return self._file.seek(at, whence)

    def tell(self) -> int:
        return self._file.tell()


def _key(name: str) -> tuple[str, str]:
    """(what the files of a sample share, the kind of this one), as WebDataset splits names."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def _expanded(name: str) -> Iterator[str]:
    """All names that braces stand for: {000..012} numbers of that width, {a,b} words."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        yield name
        return
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", found[1])
    if numbers:
        low, high = numbers.groups()
        if int(low) > int(high):
            raise UserError(f"{name}: counts down from {low} to {high}; write the lower one first")
        words = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
    elif "," in found[1]:
        words = iter(found[1].split(","))
    else:
        raise UserError(
            f"{name}: braces hold numbers, as {{00000..00999}}, or words, as {{a,b}}, "
            f"not {found[0]}"
        )
    for word in words:
        yield from _expanded(name[: found.start()] + word + name[found.end() :])
