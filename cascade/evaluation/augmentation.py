"""Noise conditioning augmentation: does super-resolution survive a noisy small picture by it?

A stage that trained without it takes the faults of the small picture for the truth. Two small
super-resolution stages are trained here for each seed, alike but for the augmentation, and are
given clean and noisy small pictures (Saharia et al. 2022, sec. 2.4).
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cascade import images
from cascade.data.transforms import block_means
from cascade.diffusion import process
from cascade.diffusion.loss import Loss
from cascade.evaluation import quality
from cascade.evaluation.claims import Property, above
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.scenes.render import render
from cascade.scenes.spec import scene_at
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, Stage, StageConfig
from cascade.storage.checkpoint import Checkpoints
from cascade.training import loop
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining

LEVEL = 0.2  # augmentation level of the noise on the small pictures
IMAGES = 4_000  # training examples of each stage

Trained = tuple[Stage, Any]
"""A stage and its parameters."""


def pair_of_configs(seed: int, count: int = IMAGES) -> tuple[StageTraining, StageTraining]:
    """Two trainings of 16 -> 64 px on `count` scenes each: with augmentation, and without."""
    augmented = StageTraining(
        stage=StageConfig(
            name="sr64",
            space=Pixels(resolution=64),
            conditions=(
                LowRes(resolution=16, augmentation=Augmentation(max_level=0.3), residual=True),
            ),
            network=EfficientUNetConfig(
                patch=4,
                levels=(
                    EfficientLevel(width=64, blocks=1, stride=1),
                    EfficientLevel(width=64, blocks=1),
                ),
                head_width=32,
                emb_width=128,
            ),
            schedule=process.Cosine(
                logsnr_max=3.0, shift=process.resolution_shift(64, reference=16)
            ),
            prediction="x0",
            loss=Loss(space="v"),
            sampling=Sampling(steps=4, guidance=1.0),
        ),
        data=ScenesData(split="train", seed=seed),
        images=count,
        batch_size=16,
        optimizer=Optimizer(
            learning_rate=2e-3, warmup_images=count // 10, cooldown_images=count // 3, b2=0.99
        ),
        ema_decay=0.99,
        seed=seed,
        save_every_images=count,
        preview_every_images=0,
    )
    alone = LowRes(resolution=16, augmentation=Augmentation(max_level=0.0), residual=True)
    plain = dataclasses.replace(augmented.stage, conditions=(alone,))
    return augmented, dataclasses.replace(augmented, stage=plain)


def trained(config: StageTraining, folder: Path) -> Trained:
    """Train a stage in `folder`, as `cascade train` does: the stage, and its averaged weights."""
    if not loop.fit(config, folder):
        raise KeyboardInterrupt
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_ema()[1]
    checkpoints.close()
    return Stage(config.stage), params


def augmentation(seeds: Sequence[int], pictures: int) -> Property:
    """Train two stages for each seed, and see what `survival` says of them.

    pictures: pictures drawn for each seed. The runs lie in a folder that is gone afterwards.
    """
    pairs = []
    with tempfile.TemporaryDirectory(prefix="cascade-properties-") as folder:
        for seed in seeds:
            names = ("with", "without")
            augmented, plain = (
                trained(config, Path(folder) / f"{name}-{seed}")
                for name, config in zip(names, pair_of_configs(seed), strict=True)
            )
            pairs.append((augmented, plain))
    return survival(pairs, seeds, pictures)


def survival(
    pairs: Sequence[tuple[Trained, Trained]], seeds: Sequence[int], pictures: int
) -> Property:
    """The claim that a stage trained with augmentation survives noise, and one without does not.

    pairs: the stages with and without, for each seed. Both see noise of the same log-SNR in the way
    they know. The first sees alpha x + sigma eps, and is told the level; the second sees
    x + (sigma / alpha) eps, which says as much and leaves the contrast alone. Chance is what the
    second sees, bilinearly enlarged.
    """
    rows: dict[str, list[list[float]]] = {name: [] for name in _NAMES}
    for ((augmented, own), (plain, other)), seed in zip(pairs, seeds, strict=True):
        side = augmented.config.resolution
        factor = side // (augmented.config.lowres_resolution or 1)
        truths = [render(scene_at(seed, i, "seen"), side) for i in range(pictures)]
        small = np.stack([block_means(truth, factor) for truth in truths])
        clean = images.to_float(jnp.asarray(small))
        k_noise, k_draw = jax.random.split(jax.random.key(seed))
        lowres: Any = augmented.config.lowres
        logsnr = lowres.augmentation.schedule.logsnr(jnp.float32(LEVEL))
        noisy = clean + jnp.exp(-logsnr / 2) * jax.random.normal(k_noise, clean.shape)
        keys = jax.random.split(k_draw, pictures)
        drawn = {
            "with, clean": _enlarged(augmented, own, clean, keys, 0.0),
            "with, noisy": _enlarged(augmented, own, clean, keys, LEVEL),
            "without, clean": _enlarged(plain, other, clean, keys, 0.0),
            "without, noisy": _enlarged(plain, other, noisy, keys, 0.0),
            "noisy, enlarged": images.to_uint8(images.upsample(noisy, (side, side))),
        }
        for name, some in drawn.items():
            rows[name].append([quality.psnr(a, b) for a, b in zip(some, truths, strict=True)])
    figures = {name: np.array(values) for name, values in rows.items()}
    with_clean, with_noisy, without_clean, without_noisy, enlarged = figures.values()
    return Property(
        title="super-resolution trained with augmentation survives noise, without it does not",
        unit="PSNR in dB",
        how=f"two stages for each seed, trained on {IMAGES} pictures, alike but for augmentation; "
        f"true small pictures, clean and with noise of level {LEVEL:g}, of which the latter, "
        "enlarged, are chance",
        figures={name: values for name, values in figures.items() if name != "noisy, enlarged"},
        claims=[
            above("noisy: with above without", with_noisy, without_noisy),
            above("noisy: with above enlargement alone", with_noisy, enlarged),
            above("noisy: without below enlargement alone", enlarged, without_noisy),
            above(
                "loss by noise: without above with",
                without_clean - without_noisy,
                with_clean - with_noisy,
            ),
        ],
        chance=float(enlarged.mean()),
    )


_NAMES = ("with, clean", "with, noisy", "without, clean", "without, noisy", "noisy, enlarged")


def _enlarged(
    stage: Stage, params: Any, lowres: Float[Array, "b h w 3"], keys: Array, level: float
) -> UInt8[np.ndarray, "b s s 3"]:
    settings = dataclasses.replace(stage.config.sampling, aug_level=level)
    return images.to_uint8(stage.sample(params, {"lowres": (lowres,)}, keys, settings=settings))
