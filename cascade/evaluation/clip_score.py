"""How well pictures show their captions, as CLIP sees it: CLIP score and R-precision.

The CLIP score is the mean of max(100 cos(picture, caption), 0) (Hessel et al. 2021). R-precision is
the share of pictures that are nearer to their own caption than to 99 others of the set (Xu et al.
2018, "AttnGAN", sec. 4). A model that was guided or chosen by a CLIP must be judged by another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cascade import images
from cascade.data.source import Example, Source, hashes_of
from cascade.errors import UserError
from cascade.evaluation.features import Features, store
from cascade.published.clip import CLIP
from cascade.scenes.judge import share
from cascade.storage import paths

OTHERS = 99
"""Captions that a picture's own must be nearer than."""
SHOWN = 24
"""Pictures on the sheet: half of them the nearest to their captions, half the farthest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How near each picture is to its caption."""

    cosines: Float[np.ndarray, " n"]
    """The cosine of a picture and its caption, -1 to 1."""
    retrieved: Bool[np.ndarray, " n"]
    """Whether its own caption is nearer to a picture than all the others that it was given."""
    others: int
    """How many other captions each was given."""
    indices: Int[np.ndarray, " n"]
    """Which examples of the dataset the pictures are."""

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values, with 95 % intervals."""
        scores = np.maximum(100 * self.cosines.astype(np.float64), 0)
        half = 1.96 * scores.std(ddof=1) / len(scores) ** 0.5
        mean = scores.mean()
        found: dict[str, Any] = {
            "pictures": len(scores),
            "clip_score": round(mean, 4),
            "clip_score_interval": [round(mean - half, 4), round(mean + half, 4)],
        }
        if self.others:
            found["r_precision"] = {**share(self.retrieved.tolist()), "others": self.others}
        return found


def score(
    source: Source,
    count: int,
    model: CLIP,
    network: Features,
    folder: paths.Path,
    *,
    batch: int,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda pictures: None,
) -> Scores:
    """See how near the first `count` pictures are to their captions; those that cannot be read are
    left out.

    network: the features of `model`. folder: for embeddings, of which those that are there are not
    made anew. seed: chooses the other captions, which are texts of the set that differ from the
    picture's own. All processes of the program call it. Raises UserError for fewer than two
    pictures that can be read.
    """
    width = model.config.projection_dim

    def rows(examples: Sequence[Example]) -> np.ndarray:
        captions = [example["caption"] for example in examples]
        texts = model.texts(captions + captions[-1:] * (batch - len(captions)))
        pictures = network([example["image"] for example in examples], batch)
        hashes = np.stack(np.divmod(hashes_of(captions), 2**16), axis=1)  # each half a float32
        return np.concatenate([pictures, texts[: len(examples)], hashes], axis=1)

    stored = store(source, count, folder, rows, batch=batch, advance=advance)
    if len(stored) < 2:
        raise UserError(
            f"{len(stored)} pictures of {count} can be read; two are needed; look at the others "
            "with `cascade data inspect`"
        )
    all_rows = stored.take(np.arange(len(stored)))
    pictures, texts, halves = np.split(all_rows, [width, 2 * width], axis=1)
    found = scores(pictures, texts, halves @ [2**16, 1], seed)
    return dataclasses.replace(found, indices=stored.indices)


def scores(
    pictures: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "n d"],
    names: Shaped[np.ndarray, " n"],
    seed: int = 0,
) -> Scores:
    """The scores of embeddings of length 1: picture i belongs to text i.

    names: numbers that are equal where texts are; equal texts are no others to each other.
    """
    own = (pictures * texts).sum(axis=1)
    different, first, which = np.unique(names, return_index=True, return_inverse=True)
    others = min(OTHERS, len(different) - 1)
    rng, retrieved = np.random.default_rng(seed), np.ones(len(own), bool)
    for i in range(len(own) if others else 0):
        chosen = rng.choice(len(different) - 1, others, replace=False)
        chosen += chosen >= which[i]
        retrieved[i] = own[i] > (texts[first[chosen]] @ pictures[i]).max()
    return Scores(cosines=own, retrieved=retrieved, others=others, indices=np.arange(len(own)))


def sheet(folder: paths.Path, source: Source, found: Scores) -> None:
    """Write clip.png, the distribution of the scores, and sheet.png, the best and the worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(np.maximum(100 * found.cosines, 0), bins=40)
    axes.set_xlabel("100 cos(picture, caption)")
    axes.set_ylabel("pictures")
    with paths.writing(folder / "clip.png") as part:
        figure.savefig(part, dpi=120, format="png")
    order = np.argsort(-found.cosines)
    shown = order if len(order) <= SHOWN else [*order[: SHOWN // 2], *order[-SHOWN // 2 :]]
    examples = [source[int(found.indices[i])] for i in shown]
    nearness = [f"{100 * found.cosines[i]:.1f}" for i in shown]
    said = [f"{n} {e['caption']}" for n, e in zip(nearness, examples, strict=True)]
    cells = images.captioned([e["image"] for e in examples], said)
    images.save_png(folder / "sheet.png", images.grid(cells, columns=6, gap=8))
