"""Embeddings on disk: what a frozen text encoder says of each text, written once and looked up.

A store is a folder, here or in object storage:

    config.json                what was embedded, by what, and how much it is; written last
    shard-00000.safetensors    some of the texts
    SHA256SUMS                 of the shards

A text is known by its hash, the 16 bytes that BLAKE2b makes of its UTF-8. Of n shards, the one with
the number floor(h n / 2^64) has it, where h is the first half of the hash, its first byte the most
significant. The tensors of a shard of m texts, which have t tokens together, of d channels:

    hashes   uint8 [m, 16]       in rising order
    offsets  int64 [m + 1]       text i has the tokens offsets[i] to offsets[i + 1] - 1
    scales   float32 [t]         of an int8 store alone
    values   float32, bfloat16 or int8 [t, d]

A text has its own tokens, the end of sequence included, and no padding. In int8 the embedding of
token j is scales[j] * values[j], where the largest value is 127 or -127. So a reader finds a text
by one multiplication and a binary search, and reads what it needs of files that are mapped into
memory; it needs neither a tokenizer nor the encoder.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cascade.config import from_json, read_json
from cascade.errors import UserError
from cascade.storage import checksums, paths, weights
from cascade.text.captions import Captions

DType = Literal["float32", "bfloat16", "int8"]
"""What the values of a store are stored as."""
HASH = 16
"""Bytes of a text's hash."""
MOST_SHARDS = 2**16
"""A store has at most so many shards."""
_SPELLED = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
_MOST_TOKENS, _MOST_WIDTH, _MOST_TEXTS = 2**20, 2**16, 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """What decides every byte of a store's shards."""

    texts_digest: str
    """The sum of the hashes of these captions and prompts, repetitions counted, modulo 2^128; 32
    hexadecimal digits."""
    text_encoder: str
    """The text encoder by the name it was loaded by."""
    encoder_digest: str
    """The SHA-256 of its weights, tokenizer and config (`cascade.text.t5.digest`)."""
    text_int8: bool
    """Whether the encoder's matrices were int8."""
    captions: Captions
    """What was done to texts before the encoder read them; their hashes are those of the texts
    before."""
    max_tokens: int
    """The length in tokens that texts were cut to."""
    window: int
    """The longest text in tokens that the encoder is meant for."""
    width: int
    """The channels of an embedding."""
    dtype: DType
    """What values are stored as."""
    shards: int
    """The number of shards, 1 to MOST_SHARDS."""

    def __post_init__(self):
        for name, most in (
            ("max_tokens", _MOST_TOKENS),
            ("window", _MOST_TOKENS),
            ("width", _MOST_WIDTH),
            ("shards", MOST_SHARDS),
        ):
            _check_count(self, name, 1, most)
        if self.dtype not in get_args(DType) or self.captions not in get_args(Captions):
            raise ValueError(f"no store has the dtype {self.dtype!r}, captions {self.captions!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig(Making):
    """What the config.json of a store says."""

    version: int = 1
    """The version of the format, which is 1."""
    source: str
    """Where the captions are from, as JSON: their data, and how many examples of it."""
    texts: int
    """The number of different texts."""
    tokens: int
    """How many tokens they have together."""
    longest: int
    """How many tokens the longest of them has; 0 in an empty store."""
    lowest_cosine: float
    """The lowest cosine, over all tokens, of what is stored to the encoder's float32; 0 to 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.version != 1:
            raise ValueError(f"version must be 1, got {self.version}: update this program")
        _check_count(self, "texts", 0, _MOST_TEXTS)
        _check_count(self, "tokens", 0, _MOST_TEXTS * _MOST_TOKENS)
        _check_count(self, "longest", 0, self.max_tokens)
        if not 0 <= self.lowest_cosine <= 1.001:
            raise ValueError(f"lowest_cosine must be in 0..1, got {self.lowest_cosine:g}")

    def reads_as(self, max_tokens: int) -> bool:
        """Whether texts that are cut to this length would have the embeddings that are stored."""
        uncut = self.longest < self.max_tokens
        return max_tokens == self.max_tokens or (uncut and max_tokens >= self.longest)


class Missing(UserError):
    """A text is asked for that is not in the store."""


class Store:
    """The embeddings of a store on this machine, by text; opened by `open_store`.

    It pickles, and opens its shards one by one, each when it is first asked for one of its texts.
    """

    def __init__(self, name: str, folder: pathlib.Path, config: StoreConfig):
        """name: what errors call it."""
        self.name, self.folder, self.config = name, folder, config
        self._shards: dict[int, Shard] = {}

    @property
    def digest(self) -> str:
        """The SHA-256 of its SHA256SUMS and config.json, which stands for all in it."""
        whole = hashlib.sha256()
        for name in (checksums.NAME, "config.json"):
            if (file := self.folder / name).is_file():
                whole.update(bytes.fromhex(checksums.digest(file)))
        return whole.hexdigest()

    def __contains__(self, text: str) -> bool:
        return self._found(hash_of(text)) is not None

    def read(
        self, texts: Sequence[str], tokens: int, *, others: bool = False
    ) -> dict[str, np.ndarray]:
        """Read texts as rows of so many tokens, in the store's dtype, zero on padding.

        Returns `text` [b, tokens, d], `text_mask` bool [b, tokens], in int8 `text_scale` float32
        [b, tokens]; `restored` makes float32 of them. others: texts that are not there have rows
        without a token in place of an error, and `text_found` bool [b] says which are there.
        Raises Missing with the first text that is not there, UserError for a longer text and for
        what is damaged.
        """
        rows = self.read_hashes([hash_of(text) for text in texts], tokens)
        found = rows["text_mask"].any(1)
        if others:
            return {**rows, "text_found": np.asarray(found)}
        if not found.all():
            text = texts[int(np.argmin(found))]
            raise Missing(
                f"embeddings {self.name}: have no caption {text!r:.300}; embed all captions of the "
                "data with `cascade data embed`, or add --embeddings-missing encode"
            )
        return rows

    def read_hashes(self, hashes: Sequence[bytes], tokens: int) -> dict[str, np.ndarray]:
        """Do what `read` does, for texts known by their hashes, others left without a token."""
        kind = np.dtype(weights.STORED[_SPELLED[self.config.dtype]])
        values = np.zeros((len(hashes), tokens, self.config.width), kind)
        scales = np.zeros((len(hashes), tokens), np.float32)
        mask = np.zeros((len(hashes), tokens), bool)
        for row, key in enumerate(hashes):
            place = self._found(key)
            if place is None:
                continue
            shard, i = place
            start, end = int(shard.offsets[i]), int(shard.offsets[i + 1])
            if (n := end - start) > tokens:
                raise UserError(
                    f"embeddings {self.name}: a text has {n} tokens, and {tokens} are asked for; "
                    f"set text_tokens to {self.config.max_tokens}"
                )
            values[row, :n] = shard.values[start:end]
            mask[row, :n] = True
            if shard.scales is not None:
                scales[row, :n] = shard.scales[start:end]
            numbers = values[row, :n] if shard.scales is None else scales[row, :n]
            if not np.isfinite(numbers.astype(np.float32, copy=False)).all():
                raise _damaged(shard.file, "it holds a value that is not a finite number")
        scale = {"text_scale": scales} if self.config.dtype == "int8" else {}
        return {"text": values, **scale, "text_mask": mask}

    def embed(self, texts: Sequence[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Give (values float32 [b, tokens, d], mask bool [b, tokens]); raises as `read` does."""
        rows = self.read(texts, tokens)
        return np.asarray(restored(rows["text"], rows.get("text_scale"))), rows["text_mask"]

    def shard(self, number: int) -> Shard:
        """Give the shard of that number. Raises UserError for one that is missing or damaged."""
        if number not in self._shards:
            shard = Shard(self.folder / shard_name(number), number, self.config)
            self._shards[number] = shard
        return self._shards[number]

    def _found(self, key: bytes) -> tuple[Shard, int] | None:
        shard = self.shard(shard_of(key, self.config.shards))
        row = shard.row(key)
        return None if row is None else (shard, row)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}


class Shard:
    """One shard, mapped into memory and checked, but for its values, which nobody has read yet."""

    scales: np.ndarray | None
    """float32 [t]; None unless the store is int8."""

    def __init__(self, file: pathlib.Path, number: int, making: Making):
        """Raises UserError for a file that is not the shard of that number of such a store."""
        _check_within(file)
        found, self._metadata = weights.mapped(file)
        wanted = {"hashes", "offsets", "values"} | ({"scales"} if making.dtype == "int8" else set())
        if found.keys() != wanted:
            raise _damaged(
                file, f"it holds {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}"
            )
        self.hashes, self.offsets, self.values = (found[k] for k in ("hashes", "offsets", "values"))
        self.scales = found.get("scales")
        m, t = len(self.hashes), len(self.values)
        kinds = {
            "hashes": ((m, HASH), "U8"),
            "offsets": ((m + 1,), "I64"),
            "values": ((t, making.width), _SPELLED[making.dtype]),
            "scales": ((t,), "F32"),
        }
        for name, array in found.items():
            shape, kind = kinds[name]
            if array.shape != shape or array.dtype != weights.STORED[kind]:
                told = f"{name} is {array.dtype} {list(array.shape)}"
                raise _damaged(file, f"{told}, not {weights.STORED[kind]} {list(shape)}")
        lengths = np.diff(self.offsets)
        whole = self.offsets[0] == 0 and self.offsets[-1] == t
        if not whole or (lengths < 1).any() or (lengths > making.max_tokens).any():
            raise _damaged(file, f"offsets must rise from 0 to {t}, by 1 to {making.max_tokens}")
        self.file, self._keys = file, self.hashes.reshape(-1).data
        high, low = self.hashes.view(">u8").astype(np.uint64).reshape(m, 2).T
        if (~((high[1:] > high[:-1]) | (high[1:] == high[:-1]) & (low[1:] > low[:-1]))).any():
            raise _damaged(file, "hashes must rise")
        ends = {shard_of(self._key(i), making.shards) for i in (0, m - 1)} if m else {number}
        if ends != {number}:
            raise _damaged(file, "it has hashes of another shard")

    @property
    def longest(self) -> int:
        """How many tokens the longest of its texts has; 0 if it has none."""
        return int(np.diff(self.offsets).max(initial=0))

    @property
    def lowest_cosine(self) -> float:
        """The lowest cosine of a token to the encoder's float32, as its metadata say."""
        try:
            cosine = float(self._metadata["lowest_cosine"])
        except (KeyError, ValueError):
            cosine = -1.0
        if not 0 <= cosine <= 1:
            raise _damaged(self.file, "its metadata say no lowest_cosine")
        return cosine

    def row(self, key: bytes) -> int | None:
        """Find the place of the text with that hash, counted from 0; None if it is not here."""
        m = len(self.hashes)
        i = bisect.bisect_left(range(m), key, key=self._key)
        return i if i < m and self._key(i) == key else None

    def _key(self, i: int) -> bytes:
        return bytes(self._keys[HASH * i : HASH * (i + 1)])


def open_store(name: str, *, part: int = 0, parts: int = 1) -> Store:
    """Open a store: a folder here, or one in object storage, of which all is first copied here.

    part, parts: of a folder here, the checksums of only every parts-th shard are compared, from
    number `part`, so that several processes share the work. Raises UserError for what is no store,
    is not whole, or is damaged.
    """
    folder = paths.path(name)
    if not folder.is_dir():
        raise UserError(f"embeddings {name}: no such folder; `cascade data embed` makes one")
    if paths.is_remote(folder):
        part, parts = 0, 1
    local = paths.local_copy(folder)
    config = read_config(local, name)
    found = checksums.damage(local, shard_names(config), part=part, parts=parts)
    if found is not None:
        raise UserError(f"embeddings {name}: {found}; copy it again, or make it anew")
    return Store(name, local, config)


def read_config(folder: paths.Path, name: str) -> StoreConfig:
    """Read the config.json of a store. Raises UserError where it is missing or makes no sense.

    name: what errors call the store.
    """
    file = folder / "config.json"
    if not file.exists() and (folder / UNFINISHED).exists():
        raise UserError(
            f"embeddings {name}: are not whole yet; the `cascade data embed` that began them goes "
            "on with them"
        )
    if not file.exists():
        raise UserError(f"embeddings {name}: has no config.json; `cascade data embed` makes one")
    paths.check_regular(file)
    return from_json(StoreConfig, read_json(file), f"embeddings {name}: config.json")


UNFINISHED = "unfinished.json"
"""The file that says what a store that is not whole yet will be."""


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def shard_names(making: Making) -> list[str]:
    """The names of all shards' files."""
    return [shard_name(number) for number in range(making.shards)]


def hash_of(text: str) -> bytes:
    """The hash by which a text is known, 16 bytes."""
    try:
        return hashlib.blake2b(text.encode(), digest_size=HASH).digest()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"text {shown!r:.300}: is not UTF-8; write it anew") from None


def shard_of(key: bytes, shards: int) -> int:
    """The number of the shard that has a text of this hash."""
    return int.from_bytes(key[:8], "big") * shards >> 64


def rounded(
    values: Float[np.ndarray, "t d"], dtype: DType
) -> tuple[np.ndarray, Float[np.ndarray, " t"] | None]:
    """Round embeddings to what a store keeps: (values, scales of int8 or None)."""
    if dtype != "int8":
        return values.astype(weights.STORED[_SPELLED[dtype]]), None
    scales = np.abs(values).max(-1, initial=0).astype(np.float32) / np.float32(127)
    divisor = np.where(scales > 0, scales, 1)[:, None]
    return np.clip(np.rint(values / divisor), -127, 127).astype(np.int8), scales


def restored(values: Any, scales: Any = None) -> Any:
    """Undo `rounded` as far as can be: float32, of NumPy or JAX as the values are.

    values: [..., d]. scales: [...] of int8, else None.
    """
    wide = values.astype(jnp.float32)
    return wide if scales is None else wide * scales[..., None]


def lowest_cosine(
    values: Float[np.ndarray, "t d"], stored: np.ndarray, scales: np.ndarray | None
) -> float:
    """The lowest cosine of a token's embedding to what is stored of it; 1 for no tokens, 0 where
    just one of the two is zero."""
    back = np.asarray(restored(stored, scales))
    product = np.einsum("td,td->t", values, back)
    size = np.linalg.norm(values, axis=-1) * np.linalg.norm(back, axis=-1)
    same = (values == back).all(-1)
    cosine = np.where(same, 1.0, product / np.where(size > 0, size, 1))
    return float(np.clip(cosine.min(initial=1.0), 0, 1))


def write_shard(
    file: pathlib.Path,
    hashes: Sequence[bytes],
    values: np.ndarray,
    scales: np.ndarray | None,
    lengths: Sequence[int],
    cosine: float,
) -> None:
    """Write one shard, whole or not at all.

    hashes: rising. lengths: the tokens of each text; values [t, d] and scales have them one text
    after the other. cosine: the shard's lowest, which its metadata keep.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    keys = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH)
    arrays: dict[str, np.ndarray] = {"hashes": keys, "offsets": offsets}
    if scales is not None:
        arrays["scales"] = scales
    arrays["values"] = values
    spelled = {kind: name for name, kind in weights.STORED.items()}
    weights.write(
        file,
        [(name, array.shape, spelled[array.dtype]) for name, array in arrays.items()],
        lambda name: arrays[name],
        metadata={"lowest_cosine": repr(cosine)},
    )


def differences(a: Making, b: Making) -> Mapping[str, tuple[Any, Any]]:
    """The fields that decide a store's bytes and are not equal, with their two values."""
    fields = [field.name for field in dataclasses.fields(Making)]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def is_partial(name: str, of: str) -> bool:
    """Whether a file has that name while one of the other name is written."""
    return re.fullmatch(rf"\.+{re.escape(of)}(\.[0-9a-f]{{16}}\.partial)+", name) is not None


def _check_count(config: Any, name: str, least: int, most: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        kind = type(config).__name__
        raise ValueError(f"{kind}.{name} must be a whole number, {least} to {most}, got {value!r}")


def _check_within(file: pathlib.Path) -> None:
    """UserError for a link that leads out of the store."""
    if file.is_symlink():
        inside = pathlib.Path(os.path.realpath(file)).parent == file.parent.resolve()
        if not inside:
            raise UserError(f"{file}: is a link that leads outside of the store; copy it there")


def _damaged(file: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"{file}: no shard of this store: {why}; copy the store again, or make it anew"
    )
