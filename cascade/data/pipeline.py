"""The one road from a dataset to a training batch.

Grain shuffles the indices of the examples anew in every epoch; each process loads its own rows of
every batch (for super-resolution: cropped, and their low resolution computed) and tokenizes them.
All of it is a function of (seed, position), so row r of batch n is the same for any number of
processes or workers, and a run that stops and resumes sees what it would have seen.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int, UInt8

from cascade.data.degradation import Degradation
from cascade.data.sources import DataConfig, Source, open_source
from cascade.errors import UserError

# Texts -> anything with `.ids` int32 [n, l] and `.mask` bool [n, l], such as cascade.text's Tokens.
TokenizeFn = Callable[[Sequence[str]], Any]
Batch = dict[str, np.ndarray]


def batches(
    config: DataConfig,
    *,
    resolution: int,
    lowres_resolution: int | None = None,
    crop: int | None = None,
    degradation: Degradation | None = None,
    batch_size: int,
    seed: int,
    tokenizer: TokenizeFn,
    rows: Int[np.ndarray, " rows"] | Sequence[int] | None = None,
    workers: int = 0,
) -> "Batches":
    """Endless batches, prefetched; of each, the rows that this process is to load.

    A batch holds `image` uint8 [b, s, s, 3], `tokens` int32 [b, l], `token_mask` bool [b, l]; for
    super-resolution (lowres_resolution given) also `lowres` uint8 [b, s/factor, s/factor, 3], the
    mean over blocks of `image`.
    crop: side of a random square of the picture, whose corner is a multiple of the factor, so that
    lowres is a crop of the whole picture's; None for whole pictures.
    degradation: makes a degraded lowres instead of the means, drawn anew for every example.
    batch_size: of all processes together. rows: which rows of each batch this process loads; None
    is all of them. seed: of the order of examples, of crops and of degradations, in 0..2**32-1; the
    dataset has its own.
    workers: processes that prepare batches, which `tokenizer` must be picklable for; 0 uses threads
    of this one.
    """
    _check(resolution, lowres_resolution, crop, degradation)
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size must be positive and workers not negative, got {batch_size}, {workers}"
        )
    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(own) or own.min() < 0 or own.max() >= batch_size:
        raise ValueError(f"rows must lie in 0..{batch_size - 1} and be some, got {rows}")
    import grain

    source = open_source(config, resolution)
    if not 1 <= len(source):
        raise UserError(f"{config}: holds no examples")
    load = _Load(source, lowres_resolution, crop, degradation)
    # Endless in effect: the sys.maxsize elements of a bare repeat() overflow in batches of one.
    epochs = 2**62 // len(source)
    examples: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)
    examples = examples.random_map(load)
    if len(own) < batch_size:
        examples = grain.MapDataset.source(cast(Any, _Rows(examples, own, batch_size)))
    dataset = examples.batch(len(own), batch_fn=_Collate(tokenizer))
    return Batches(dataset, examples=batch_size, workers=workers)


class Batches(Iterator[Batch]):
    """Iterator over batches; its state is the number of examples taken by all processes so far.

    So a run may resume with another number of processes, workers, or examples a batch.
    """

    def __init__(self, dataset: Any, *, examples: int, workers: int):
        """dataset: a Grain MapDataset of batches. examples: in one step, of all processes."""
        self._dataset, self._examples, self._workers = dataset, examples, workers
        self._step, self._iterator = 0, None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """JSON values."""
        return {"examples": self._step * self._examples}

    def set_state(self, state: dict[str, int]) -> None:
        step, rest = divmod(state["examples"], self._examples)
        if rest:
            raise UserError(
                f"the run stopped after {state['examples']} examples, which is no multiple of the "
                f"{self._examples} of a batch now; resume with a batch size that divides it"
            )
        self.close()
        self._step = step

    def close(self) -> None:
        """Stop prefetching; the next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

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


def block_means(image: UInt8[np.ndarray, "h w c"], factor: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """`images.downsample` of a uint8 picture, rounded to uint8: exact, and ten times as fast."""
    h, w, c = image.shape
    rows = image.reshape(h // factor, factor, w * c)
    columns = np.add.reduce(rows, axis=1, dtype=np.float32).reshape(h // factor, -1, factor, c)
    total = sum(columns[:, :, i] for i in range(factor))
    return np.rint(total / factor**2).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class _Load:
    """Index -> example, with `lowres` where asked."""

    source: Source
    lowres_resolution: int | None
    crop: int | None
    degradation: Degradation | None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        if self.lowres_resolution is None:
            return {**self.source[index]}
        factor = self.source.resolution // self.lowres_resolution
        if self.crop is None:
            example = self.source[index]
        else:
            free = self.lowres_resolution - self.crop // factor
            y, x = (factor * int(i) for i in rng.integers(0, free + 1, 2))
            example = self.source.window(index, y, x, self.crop)
        if self.degradation is None:
            lowres = block_means(example["image"], factor)
        else:
            lowres = self.degradation(example["image"], rng, factor)
        return {**example, "lowres": lowres}


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
    """Examples -> batch."""

    tokenizer: TokenizeFn

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        tokens = self.tokenizer([example["caption"] for example in examples])
        pictures = [name for name in ("image", "lowres") if name in examples[0]]
        stacked = {name: np.stack([example[name] for example in examples]) for name in pictures}
        return stacked | {
            "tokens": np.asarray(tokens.ids, np.int32),
            "token_mask": np.asarray(tokens.mask, bool),
        }


def _check(resolution, lowres_resolution, crop, degradation) -> None:
    if lowres_resolution is not None and resolution % lowres_resolution:
        raise ValueError(
            f"resolution must be a multiple of lowres_resolution={lowres_resolution}, "
            f"got {resolution}"
        )
    if crop is not None:
        if lowres_resolution is None:
            raise ValueError(
                f"crop is for super-resolution: give lowres_resolution, got crop={crop}"
            )
        factor = resolution // lowres_resolution
        if crop % factor or not 0 < crop <= resolution:
            raise ValueError(
                f"crop must be a multiple of the factor {factor} in {factor}..{resolution}, "
                f"got {crop}"
            )
    if degradation is not None and lowres_resolution is None:
        raise ValueError(
            f"degradation is for super-resolution: give lowres_resolution, got {degradation}"
        )
