"""Figures of what a stage draws while it trains: a small version of `cascade eval`.

A few dozen pictures say little by themselves. As the same captions and the same noise are drawn
each time, their figures tell how one run's weights come along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cascade.data.source import Example
from cascade.errors import UserError
from cascade.evaluation import clip_score, distances, features
from cascade.evaluation.distances import Statistics
from cascade.evaluation.features import Features
from cascade.published import clip
from cascade.scenes import judge
from cascade.scenes.captions import Facts
from cascade.scenes.dataset import ScenesData
from cascade.scenes.reading import SIDES
from cascade.training.stage_training import StageTraining

BATCH = 16
"""Pictures that a network sees together."""


class WhileTraining:
    """What `training.loop.fit` calls to evaluate a job: figures named "eval/...".

    fd_proxy, and by the networks that the job names fid and fd_clip, are distances to the true
    pictures; clip_score is that of captions; facts is the share right of what scenes assert.
    """

    def __init__(self, job: StageTraining):
        """Loads the networks. Raises UserError for what is wrong with them."""
        self._job, self._of_true = job, list[Statistics]()
        first = jax.process_index() == 0  # the others only help to draw
        self._clip = clip.load(job.eval_clip) if job.eval_clip and first else None
        self._networks: list[Features] = [features.of_random()]
        if self._clip is not None:
            self._networks.append(features.of_clip(self._clip))
        if job.eval_inception and first:
            self._networks.append(features.of_inception(job.eval_inception))

    def __call__(self, running: Any, params: Any) -> dict[str, float]:
        """The figures of these weights, in the first process; all call it.

        Raises UserError for a stage with a condition that examples say nothing of.
        """
        examples, facts = self._examples(running)
        drawn = running.draw(params, examples)
        if jax.process_index() != 0:
            return {}
        if drawn is None:
            raise UserError(
                f"eval_every_images={self._job.eval_every_images}: examples do not say all that "
                f"{self._job.name} is conditioned on; set it to 0"
            )
        pictures, captions = list(drawn), [example["caption"] for example in examples]
        found = {}
        for network, true in zip(self._networks, self._true(running), strict=True):
            rows = _rows(network, pictures)
            name = f"{'fd' if network.suffix else 'fid'}{network.suffix}"
            found[name] = distances.frechet(distances.statistics([rows]), true)
            if self._clip is not None and network.suffix == "_clip":
                texts = self._clip.texts(captions)
                names = np.unique(captions, return_inverse=True)[1]
                scores = clip_score.scores(rows, texts, names)
                found["clip_score"] = scores.as_json()["clip_score"]
        if facts:
            verdicts = [judge.judge(p, f) for p, f in zip(pictures, facts, strict=True)]
            found["facts"] = float(np.mean([v.right for some in verdicts for v in some]))
        return {f"eval/{name}": round(float(value), 6) for name, value in found.items()}

    def _examples(self, running: Any) -> tuple[list[Example], list[Facts]]:
        """What is drawn, and what scenes assert."""
        job, data = self._job, self._job.data
        if not isinstance(data, ScenesData):
            return running.examples(job.eval_pictures), []
        if data.split == "train" and running.embeds_all:
            data = dataclasses.replace(data, split="seen")
        source = data.open(job.stage.resolution)
        indices = range(min(job.eval_pictures, len(source)))
        readable = job.stage.resolution in SIDES
        facts = [data.scene(i)[1].facts for i in indices] if readable else []
        return [source[i] for i in indices], facts

    def _true(self, running: Any) -> Sequence[Statistics]:
        """The statistics of the true pictures, which are the same each time."""
        if not self._of_true:
            pictures = [example["image"] for example in self._examples(running)[0]]
            of_each = [_rows(network, pictures) for network in self._networks]
            self._of_true = [distances.statistics([rows]) for rows in of_each]
        return self._of_true


def _rows(network: Features, pictures: Sequence[np.ndarray]) -> np.ndarray:
    starts = range(0, len(pictures), BATCH)
    return np.concatenate([network(pictures[i : i + BATCH], BATCH) for i in starts])
