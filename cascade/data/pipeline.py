"""The one road from a dataset to a training batch.

Grain shuffles the indices of the examples anew in every epoch; each process loads its own rows of
every batch (for super-resolution: cropped, and their low resolution computed) and tokenizes them.
All of it is a function of (seed, position), so row r of batch n is the same for any number of
processes or workers, and a run that stops and resumes sees what it would have seen.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from cascade.data.degradation import Degradation
from cascade.data.source import FILTERED, Source
from cascade.data.transforms import BAD_RECORDS, LoadExample, check_resolutions
from cascade.errors import UserError

TokenizeFn = Callable[[Sequence[str]], Any]
"""Texts -> anything with `.ids` int32 [n, l] and `.mask` bool [n, l], as cascade.text's Tokens; or
a dict of arrays [n, ...], which a batch then holds by their names."""
Batch = dict[str, np.ndarray]
_KILLED = "terminated unexpectedly"
"""What Grain says of a worker that did not end by itself."""
_ENOUGH_TO_JUDGE = 1000
"""So many examples are asked for before the share of bad ones ends a run."""


def batches(
    source: Source,
    *,
    lowres_resolution: int | None = None,
    crop: int | None = None,
    degradation: Degradation | None = None,
    batch_size: int,
    seed: int,
    tokenizer: TokenizeFn | None,
    rows: Int[np.ndarray, " rows"] | Sequence[int] | None = None,
    workers: int = 0,
    most_bad: float = 1.0,
) -> "Batches":
    """Endless batches, prefetched, each with only the rows that this process is to load.

    A batch holds `image` uint8 [b, s, s, 3], `tokens` int32 [b, l], `token_mask` bool [b, l] (or
    what else `tokenizer` gives); for
    super-resolution (lowres_resolution given) also `lowres` uint8 [b, s/factor, s/factor, 3], the
    means over blocks of `image`. Here b is the number of rows, and s is `crop` or the source's
    resolution.
    What else the dataset's examples hold is stacked under its own name.

    lowres_resolution: side of the whole low-resolution picture in pixels.
    crop: side in pixels of a random square of the picture, whose corner is a multiple of the
        factor, so that lowres is a crop of the whole picture's; None takes whole pictures.
    degradation: makes a degraded lowres in place of the means, drawn anew for every example.
    batch_size: examples in a batch, of all processes together.
    seed: decides the order of examples, crops and degradations, in 0..2**32 - 1; the dataset has
        its own.
    tokenizer: None leaves captions out.
    rows: which rows of each batch this process loads; None loads all.
    workers: processes that prepare batches, which must be able to pickle `tokenizer`; 0 uses
        threads of this one.
    most_bad: the share of examples that may be left out at the start, and that may be unreadable
        once a thousand were asked for. Another one, drawn at random, stands in for each of these.

    Raises ValueError for options that make no sense, and UserError for a dataset that is empty or
    has too many examples that cannot be used.
    """
    check_resolutions(source.resolution, lowres_resolution, crop, degradation)
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size must be positive and workers not negative, got {batch_size}, {workers}"
        )
    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(own) or own.min() < 0 or own.max() >= batch_size:
        raise ValueError(f"rows must lie in 0..{batch_size - 1} and be some, got {rows}")
    import grain

    if not 1 <= len(source):
        raise UserError("the dataset holds no examples; name a folder or a split that has some")
    if (out := len(source.left_out)) > most_bad * (out + len(source)):
        raise UserError(
            f"{out} of {out + len(source)} examples cannot be used, which is more than the share "
            f"of {most_bad:g} that may be left out; the first: {source.left_out[0]}"
        )
    load = LoadExample(source, lowres_resolution, crop, degradation)
    examples = order(source, seed).random_map(load)
    if len(own) < batch_size:
        examples = grain.MapDataset.source(cast(Any, _Rows(examples, own, batch_size)))
    dataset = examples.batch(len(own), batch_fn=_Collate(tokenizer))
    batches = Batches(dataset, examples=batch_size, workers=workers, most_bad=most_bad)
    batches.bad_records += [(record.key, record.reason) for record in source.left_out]
    return batches


class Batches(Iterator[Batch]):
    """An iterator over batches; its state is the number of examples taken by all processes so far.

    So a run may resume with another number of processes, of workers, or of examples in a batch.
    """

    bad_records: list[tuple[str, str]]
    """The (key, reason) of what could not be read up to the newest batch, in the order in which
    they were met, some more than once; whoever has noted them may clear it."""

    def __init__(self, dataset: Any, *, examples: int, workers: int, most_bad: float = 1.0):
        """dataset: a Grain MapDataset of batches. examples: how many all processes take a step.

        most_bad: see `batches`.
        """
        self._dataset, self._examples, self._workers = dataset, examples, workers
        self._step, self._iterator = 0, None
        self.bad_records = []
        self._most_bad, self._asked, self._bad = most_bad, 0, 0

    def __next__(self) -> Batch:
        if self._asked >= _ENOUGH_TO_JUDGE and self._bad > self._most_bad * self._asked:
            raise UserError(
                f"{self._bad} of {self._asked} examples could not be read, which is more than the "
                f"share of {self._most_bad:g} that may be left out; see skipped.jsonl in the run's "
                "folder, and mend the dataset"
            )
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except RuntimeError as e:
            if not self._workers or _KILLED not in str(e):
                raise
            batch = self._anew()
        bad = batch.pop(BAD_RECORDS, ())
        self.bad_records += bad
        self._bad += sum(not reason.startswith(FILTERED) for _, reason in bad)
        self._asked += len(bad) + len(batch["image"])
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The state, as JSON values."""
        return {"examples": self._step * self._examples}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state.

        Raises UserError if it is no whole number of batches, and ValueError if it is no state.
        """
        if not 0 <= state["examples"] < 2**62:
            raise ValueError("examples must be 0 or more")
        step, rest = divmod(state["examples"], self._examples)
        if rest:
            raise UserError(
                f"the run stopped after {state['examples']} examples, which is no multiple of the "
                f"{self._examples} of a batch now; resume with a batch size that divides it"
            )
        self.close()
        self._step = step

    def close(self) -> None:
        """Stop prefetching; asking for the next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _anew(self) -> Batch:
        """The next batch, of new data workers: one of those before was killed."""
        told = "a data worker was killed (by the system, for want of memory?)"
        print(f"warning: {told}; all are started again", file=sys.stderr)
        self.close()
        self._iterator = self._start()
        try:
            return next(self._iterator)
        except RuntimeError as e:
            if _KILLED not in str(e):
                raise
            raise UserError(f"{told}, and so was a new one; set fewer workers") from None

    def _start(self) -> Any:
        import grain
        from absl import flags

        # One batch is one element here, so a few of them in flight are enough.
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
        rest = self._dataset.slice(slice(self._step, None))
        if not self._workers:
            return iter(rest.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():
            # Grain's worker processes read absl flags, which only absl's own main function parses.
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        multi = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
        return iter(rest.to_iter_dataset(options).mp_prefetch(multi))


def order(source: Source, seed: int) -> Any:
    """A Grain MapDataset of the indices of examples, shuffled in each epoch; endless in effect."""
    import grain

    # The sys.maxsize elements of a bare repeat() overflow in batches of one.
    if not source.parts:
        whole = grain.MapDataset.range(len(source))
        return whole.seed(seed).shuffle().repeat(2**62 // len(source))
    parts, start, total = [], 0, sum(weight for _, weight in source.parts)
    for number, (size, weight) in enumerate(source.parts):
        part = grain.MapDataset.range(start, start + size).seed((seed + number) % 2**32).shuffle()
        # Mixed they end with the first of them, so each is as long as its share of 2**60.
        parts.append(part.repeat(max(1, int(2**60 * weight / total) // size)))
        start += size
    return grain.MapDataset.mix(parts, [weight for _, weight in source.parts]).seed(seed)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The examples in some rows of each batch, as a Grain source."""

    examples: Any
    rows: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size * len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        step, i = divmod(int(position), len(self.rows))
        return self.examples[step * self.batch_size + int(self.rows[i])]


@dataclasses.dataclass(frozen=True)
class _Collate:
    """Reads the captions of examples and stacks all arrays: examples -> batch."""

    tokenizer: TokenizeFn | None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        names = [name for name in examples[0] if name not in ("caption", BAD_RECORDS)]
        stacked = {name: np.stack([example[name] for example in examples]) for name in names}
        if bad := [record for example in examples for record in example.get(BAD_RECORDS, ())]:
            stacked[BAD_RECORDS] = cast(Any, bad)  # host-only, taken out again by Batches
        return stacked | text_arrays(self.tokenizer, [e["caption"] for e in examples])


def text_arrays(tokenizer: TokenizeFn | None, captions: Sequence[str]) -> Batch:
    """What a batch holds of its captions; nothing without a tokenizer."""
    if tokenizer is None:
        return {}
    found = tokenizer(captions)
    if isinstance(found, Mapping):
        return dict(found)
    ids, mask = np.asarray(found.ids, np.int32), np.asarray(found.mask, bool)
    return {"tokens": ids, "token_mask": mask}
