"""The captions of a dataset into a store of embeddings, by all processes together."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade.errors import OptionError, UserError
from cascade.storage import paths

if TYPE_CHECKING:
    from cascade.data.source import Data, Source
    from cascade.text.store import Making, StoreConfig
    from cascade.text.store_making import Fact, Gathered

MOST_PROMPTS = 2**26
"""Bytes of the largest file of prompts."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Embed all captions of a dataset once, so that training needs no text encoder in memory.

    Writes a store, a folder that `cascade train --embeddings STORE` takes, and prints what is in it
    as JSON. Each text is in it once. The same command goes on where it was interrupted, shard by
    shard; several processes, started as for `cascade train`, make shards of their own each.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset, as for `cascade data inspect`; of `scenes`, made now, with --count."""
    out: str
    """The store to write, here or in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME): a new or
    empty folder, or one that this command has begun."""
    text_encoder: str = "scenes"
    """The text encoder, as `cascade train` takes it: the one that ships, a folder, or a name on the
    hub."""
    text_tokens: int = 128
    """Length in tokens that captions are cut to, unless the text encoder's own window is shorter;
    as in training."""
    captions: Literal["verbatim", "lower", "clean"] = "verbatim"
    """What is done to captions first; as in training."""
    text_int8: bool = False
    """Keep the text encoder's matrices in int8; as in training."""
    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """What embeddings are stored as: int8 has a scale for each token."""
    prompts: Path | None = None
    """A UTF-8 file of texts to embed too, one a line, such as the prompts of previews."""
    split: str = "train"
    """The split of the scenes or of the TFDS dataset."""
    seed: int = 0
    """Which endless list of scenes, 0 or more."""
    count: int | None = None
    """Examples whose captions are taken, from the first; None is all."""
    shards: int | None = None
    """Files to write, 1 to 65536; None is one for every 16384 captions."""
    batch_size: int = 64
    """Texts encoded together, at least 1."""
    fsdp: int = -1
    """Devices of each process that share the encoder's weights; the others hold copies. -1 is all
    of them."""


def embed(options: EmbedOptions, data: Data) -> dict[str, Any]:
    """Make the store of a dataset's captions, or the rest of it, with all processes together.

    Returns what is in it as JSON values. Raises UserError for options that make no sense, a folder
    that holds something else, and a disk that is full.
    """
    try:
        return _embed(options, data)
    except OSError as e:
        if e.errno not in paths.FULL:
            raise
        raise UserError(
            f"{options.out}: cannot be written to ({e.strerror}); whole shards stay; make room, "
            "then run the same command again"
        ) from None


def _embed(options: EmbedOptions, data: Data) -> dict[str, Any]:
    import jax

    from cascade.config import to_json
    from cascade.devices import distributed
    from cascade.text import store, store_making, t5

    _check(options)
    folder, encoder = paths.path(options.out), t5.locate(options.text_encoder)
    config = t5.read_config(encoder)
    _begun(folder)  # what may be wrong with it is told before a long look at captions
    source, prompts = data.open(_RESOLUTION), _prompts(options.prompts)
    count = len(source) if options.count is None else min(options.count, len(source))
    shards = options.shards or -(-(count + len(prompts)) // store_making.SHARD_TEXTS)
    if shards > store.MOST_SHARDS:
        raise UserError(
            f"{count} captions would be in {shards} shards, and a store has at most "
            f"{store.MOST_SHARDS}; give --shards {store.MOST_SHARDS}"
        )
    own = range(jax.process_index(), shards, jax.process_count())
    gathered = store_making.Gathered(shards, own)
    left_out = len(source.left_out) + _gather(gathered, source, count, prompts)
    making = store.Making(
        texts_digest=gathered.digest,
        text_encoder=options.text_encoder,
        encoder_digest=t5.digest(encoder),
        text_int8=options.text_int8,
        captions=options.captions,
        max_tokens=min(options.text_tokens, config.n_positions),
        window=config.n_positions,
        width=config.d_model,
        dtype=options.dtype,
        shards=shards,
    )
    distributed.agree({"command, dataset or text encoder": json.dumps(to_json(making))})
    with contextlib.ExitStack() as stack:
        distributed.all_or_none(lambda: _begin(folder, making, stack))
        if (folder / "config.json").exists():
            return _report(options, store.read_config(folder, options.out), left_out, 0)
        new = [n for n in own if not (folder / store.shard_name(n)).exists()]
        there = {n: store_making.fact_of(folder, n, making) for n in set(own) - set(new)}
        made_now = _make(options, folder, making, {n: gathered.texts[n] for n in new})
        facts = _of_all(there | made_now, shards)
        told = json.dumps({"data": to_json(data), "count": count})
        made = store_making.config_of(making, facts, told)
        if jax.process_index() == 0:
            store_making.finish(folder, made, facts)
            (folder / store.UNFINISHED).unlink()
        return _report(options, made, left_out, len(new))


_RESOLUTION = 64
"""Data is opened at some resolution; no picture is looked at."""


_PACKED = struct.Struct("<qqqd32s")


def _check(options: EmbedOptions) -> None:
    for name in ("text_tokens", "count", "shards", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(name, value, "must be 1 or more")
    if options.fsdp < 1 and options.fsdp != -1:
        raise OptionError("fsdp", options.fsdp, "must be 1 or more, or -1")


def _prompts(file: Path | None) -> list[str]:
    """The prompts of a file, and the empty one, which stands for no text in some stages."""
    if file is None:
        return [""]
    path = paths.path(file)
    try:
        paths.check_regular(path)
        with path.open("rb") as opened:
            content = opened.read(MOST_PROMPTS + 1)
        if len(content) > MOST_PROMPTS:
            raise UserError(f"--prompts {file}: has more than {MOST_PROMPTS} bytes; give less")
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as e:
        raise UserError(f"--prompts {file}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {file}: is not UTF-8 text; save it as UTF-8") from None
    return ["", *(line for line in lines if line.strip())]


def _gather(gathered: Gathered, source: Source, count: int, prompts: Iterable[str]) -> int:
    """Note all texts; returns how many captions cannot be read."""
    from cascade.data.source import BadRecord
    from cascade.devices.terminal import bar

    bad = 0
    for prompt in prompts:
        gathered.add(prompt)
    with bar(total=count, unit="captions", desc="reading", leave=False) as shown:
        for index in range(count):
            try:
                for caption in source.captions_of(index):
                    gathered.add(caption)
            except BadRecord as e:
                if not bad:
                    told = f"{e.key}: {e.reason}"
                    print(f"warning: left out {told}; others are counted", file=sys.stderr)
                bad += 1
            shown.update()
    return bad


def _begun(folder: paths.Path) -> Making | None:
    """What is in the folder, or will be; None for a new one. UserError where it holds other
    things."""
    from cascade.config import from_json, read_json
    from cascade.text import store

    unfinished = folder / store.UNFINISHED
    if (folder / "config.json").exists():
        return store.read_config(folder, str(folder))
    if unfinished.exists():
        return from_json(store.Making, read_json(unfinished), str(unfinished))
    if folder.exists() and (not folder.is_dir() or any(map(_is_other, folder.iterdir()))):
        raise UserError(f"{folder}: exists already; name a new or empty folder")
    return None


def _begin(folder: paths.Path, making: Making, stack: contextlib.ExitStack) -> None:
    """Claim the folder for as long as the stack is open. UserError where it holds other things."""
    from cascade.config import to_json
    from cascade.storage.lock import Lock
    from cascade.text import store, store_making

    there, unfinished = _begun(folder), folder / store.UNFINISHED
    for name, (was, now) in {} if there is None else store.differences(there, making).items():
        raise UserError(
            f"{folder}: holds embeddings with another {name} ({was} there, {now} here); give the "
            "command and the captions that began it, or name another folder"
        )
    paths.make_folder(folder)
    stack.enter_context(
        Lock(folder, held_by="another `cascade data embed`", way_out="name another folder")
    )
    store_making.clear_partial(folder, _OWN)
    if there is None:
        paths.write_json(unfinished, to_json(making))
    elif (folder / "config.json").exists() and unfinished.exists():  # killed in between
        unfinished.unlink()


_OWN = ("unfinished.json", "config.json", "SHA256SUMS", "running.json")
"""What the first process writes."""


def _is_other(file: paths.Path) -> bool:
    """Whether a file is none that a process which was killed at its start may have left."""
    from cascade.text import store

    left = any(store.is_partial(file.name, name) for name in _OWN)
    return not left and file.name != "running.json"


def _make(
    options: EmbedOptions,
    folder: paths.Path,
    making: Making,
    texts: Mapping[int, Mapping[bytes, str]],
) -> dict[int, Fact]:
    """Write the shards of these texts, by number; returns what is known of them."""
    if not texts:
        return {}
    import jax

    from cascade.devices import sharding
    from cascade.devices.terminal import bar
    from cascade.text import T5Encoder, store, store_making

    shared = options.fsdp == -1
    mesh = sharding.make_mesh(
        sharding.MeshConfig(data=1 if shared else -1, fsdp=options.fsdp), jax.local_devices()
    )
    placed, parts = sharding.batch_sharding(mesh), sharding.batch_parts(mesh)
    encoder = T5Encoder.load(
        options.text_encoder,
        options.text_tokens,
        captions=options.captions,
        int8=options.text_int8,
        shardings=functools.partial(sharding.shardings, mesh=mesh),
    )
    rows = -(-options.batch_size // parts) * parts
    with bar(total=sum(map(len, texts.values())), unit="texts", desc="embedding") as shown:

        def encode(some: Sequence[str]) -> Iterator[tuple[int, Any]]:
            place = functools.partial(jax.device_put, device=placed)
            for found in store_making.encoded(encoder, encoder.tokenize(some), rows, place):
                shown.update()
                yield found

        facts = {}
        for number, own in texts.items():
            store_making.clear_partial(folder, [store.shard_name(number)])
            facts[number] = store_making.make_shard(folder, number, making, own, encode)
    return facts


def _of_all(facts: Mapping[int, Fact], shards: int) -> list[Fact]:
    """The facts of all shards, which all processes tell each other. facts: by number, its own."""
    import numpy as np
    from jax.experimental import multihost_utils

    from cascade.text.store_making import Fact

    table = np.zeros((shards, _PACKED.size), np.uint8)
    for number, fact in facts.items():
        table[number] = np.frombuffer(_PACKED.pack(*fact), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(table))
    table = everyone.reshape(-1, *table.shape).max(0)  # each row is zero in all but one
    return [Fact(*_PACKED.unpack(row.tobytes())) for row in table]


def _report(options: EmbedOptions, made: StoreConfig, left_out: int, new: int) -> dict[str, Any]:
    each = {"float32": 4 * made.width, "bfloat16": 2 * made.width, "int8": made.width + 4}
    size = made.tokens * each[made.dtype] + made.texts * 24
    return {
        "store": options.out,
        "texts": made.texts,
        "tokens": made.tokens,
        "longest": made.longest,
        "max_tokens": made.max_tokens,
        "dtype": made.dtype,
        "bytes": size,
        "bytes_per_text": round(size / made.texts, 1),
        "lowest_cosine": made.lowest_cosine,
        "captions_left_out": left_out,
        "shards": made.shards,
        "shards_made_now": new,
    }
