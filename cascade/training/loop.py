"""Training of one stage: configuration, state, one step, and the loop.

    dataset -> data -> stage.loss -> train_step -> checkpoint

A run lives in one folder. The same command starts it and, when the folder holds a checkpoint,
continues it with the numbers it would have had: parameters, optimizer, EMA, the place in the data
and the random keys (all folded from seed and step) are restored. Progress is counted in images.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cascade import images
from cascade.config import from_json, to_json
from cascade.data import Degradation, FolderData, ScenesData, TFDSData, batches
from cascade.devices import flops, sharding
from cascade.errors import UserError
from cascade.models import Conditioning, placing
from cascade.published.deepfloyd import stage as deepfloyd
from cascade.published.deepfloyd.unet import IFUNetConfig
from cascade.runner import model_folder as pretrained
from cascade.stage import Stage, StageConfig
from cascade.storage import paths
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.paths import Path
from cascade.storage.weights import load_safetensors, save_safetensors
from cascade.text import DEFAULT_MAX_TOKENS, T5Encoder
from cascade.text.captions import Captions
from cascade.training import ema as averages
from cascade.training import lora
from cascade.training.log import TrainingLog

State = dict[str, Any]
NORMS = ("grad_norm", "update_norm", "param_norm")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The update rule and its learning rate over the run.

    The rate rises linearly over warmup_images, stays, and falls linearly to zero over the last
    cooldown_images. clip: largest global gradient norm. weight_decay: of adamw, on matrices and
    convolutions only. b2, eps: Adam's. Adafactor is optax's default, whose rate is relative to each
    parameter's size (the base model of Saharia et al. 2022).
    """

    name: Literal["adamw", "adam", "adafactor"] = "adam"
    learning_rate: float = 1e-4
    warmup_images: int = 0
    cooldown_images: int = 0
    clip: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's result.

    text_tokens: length that captions are padded or cut to, unless the text encoder's own window is
    shorter (the paper states none). captions: what is done to them first, see `cascade.text`;
    DeepFloyd IF has 77 tokens of "clean" ones. text_int8: keep the text encoder's matrices in int8.
    images: training examples in all, repetitions counted. batch_size: examples a step, over all
    devices and microbatches. microbatches: gradients of equal parts of the batch are averaged, for
    less memory and the same result. crop: side in pixels of the aligned crops a super-resolution
    stage trains on; None is the whole picture. degradation: how its low-resolution pictures are
    spoiled; None is plain means over blocks. init: a model, as `cascade sample --model` names it,
    whose stage of the same name gives the first weights; None is fresh ones. lora_rank: train
    adapters of that rank to the projections of attention instead of the weights of `init`
    (`training.lora`), which must stay where it is; 0 trains the weights themselves. ema_decay: per
    step, reached gradually as (1 + step) / (10 + step). ema_profiles: relative widths (sigma_rel of
    `training.ema`) of averages kept besides, each costing the memory of the weights and written
    every ema_snapshot_images to ema/STEP_WIDTH.safetensors; from the snapshots of two, such as .05
    and .1 (Karras et al. 2024), `cascade export --ema` makes any other. workers: processes of each
    host that prepare data; 0 uses threads of the one that trains. preview_prompts: drawn with the
    EMA weights every preview_every_images (0: never). keep: newest checkpoints kept. skip_limit:
    updates that are not finite are left out; after so many in a row training stops. wandb: a
    Weights & Biases project that is sent the figures too. profile_steps: so many steps after the
    first three are traced into WORKDIR/profile (jax.profiler).
    """

    stage: StageConfig
    data: ScenesData | TFDSData | FolderData = field(default_factory=ScenesData)
    text_encoder: str = "scenes"
    text_tokens: int = DEFAULT_MAX_TOKENS
    captions: Captions = "verbatim"
    text_int8: bool = False
    images: int
    batch_size: int
    microbatches: int = 1
    crop: int | None = None
    degradation: Degradation | None = None
    init: str | None = None
    lora_rank: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float = 0.9999
    ema_profiles: tuple[float, ...] = ()
    ema_snapshot_images: int = 1_000_000
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    seed: int = 0
    workers: int = 0
    log_every_images: int = 10_000
    save_every_images: int = 100_000
    preview_every_images: int = 100_000
    preview_prompts: tuple[str, ...] = ()
    keep: int = 3
    skip_limit: int = 20
    wandb: str | None = None
    profile_steps: int = 0

    def __post_init__(self):
        every = ("log_every_images", "save_every_images", "ema_snapshot_images")
        counts = ("images", "batch_size", "microbatches", "text_tokens", "keep", "skip_limit")
        free = ("seed", "workers", "preview_every_images", "profile_steps")
        for name in (*counts, *every, *free):
            if (value := getattr(self, name)) < (least := int(name not in free)):
                raise ValueError(f"TrainConfig.{name} must be at least {least}, got {value}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"TrainConfig.batch_size must be a multiple of microbatches={self.microbatches}, "
                f"got {self.batch_size}"
            )
        if self.lora_rank < 0 or (self.lora_rank and self.init is None):
            raise ValueError(
                "TrainConfig.lora_rank must be 0, or positive with an init whose weights it adapts "
                f"to, got {self.lora_rank}"
            )
        if self.stage.autoencoder is not None:
            raise ValueError(
                "TrainConfig.stage.autoencoder must be None: a latent stage is drawn from, not "
                "trained"
            )
        if self.lora_rank and self.ema_profiles:
            raise ValueError("TrainConfig.ema_profiles are of weights: none with a lora_rank")
        for width in self.ema_profiles:
            averages.gamma_from_sigma_rel(width)
        low, crop = self.stage.lowres_resolution, self.crop
        if self.degradation is not None and low is None:
            raise ValueError("TrainConfig.degradation is for super-resolution stages only")
        if crop is not None:
            if low is None:
                raise ValueError("TrainConfig.crop is for super-resolution stages only")
            factor = self.stage.resolution // low
            if crop % factor or not 0 < crop <= self.stage.resolution:
                raise ValueError(
                    f"TrainConfig.crop must be a multiple of the upsampling factor {factor} and at "
                    f"most {self.stage.resolution}, got {crop}"
                )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, the last one completing `images`."""
        return -(-self.images // self.batch_size)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optax chain of a run: clip by global norm, the rule, the rate by step."""
    o, rate = config.optimizer, functools.partial(learning_rate, config)
    if o.name == "adafactor":
        rule = optax.adafactor(rate)
    elif o.name == "adam":
        rule = optax.adam(rate, b1=o.b1, b2=o.b2, eps=o.eps)
    else:
        rule = optax.adamw(
            rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=_has_fan_in
        )
    return optax.chain(optax.clip_by_global_norm(o.clip), rule)


def learning_rate(config: TrainConfig, step: Any) -> jax.Array:
    """The rate of the step with this number, counted from 0."""
    o, b = config.optimizer, config.batch_size
    rise = jnp.minimum(1.0, (step + 1) / max(1, o.warmup_images // b))
    if not (cooldown := o.cooldown_images // b):
        return o.learning_rate * rise  # the same program however long the run is
    return o.learning_rate * jnp.clip((config.steps - step) / cooldown, 0.0, rise)


def init_state(
    optimizer: optax.GradientTransformation, params: Any, profiles: tuple[float, ...] = ()
) -> State:
    """{train: {params, opt_state, step}, ema}: all that changes while training.

    With profiles, train also has the power-function average of each width, named by it.
    """
    train = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    if profiles:
        train["profiles"] = {str(width): jax.tree.map(jnp.copy, params) for width in profiles}
    return {"train": train, "ema": jax.tree.map(jnp.copy, params)}


def begin(config: TrainConfig, optimizer: optax.GradientTransformation, params: Any) -> State:
    """The state of a run whose network has these weights.

    With a lora_rank, what trains are the adapters, and "frozen" holds the weights, in the dtype
    that the network computes in; it is in no checkpoint.
    """
    if not config.lora_rank:
        return init_state(optimizer, params, config.ema_profiles)
    dtype = jnp.dtype(config.stage.network.compute_dtype)
    frozen = jax.tree.map(lambda x: x.astype(dtype), params)
    key = jax.random.key(config.seed, impl="rbg")
    adapters = lora.adapters(frozen, config.lora_rank, key)
    return init_state(optimizer, adapters, config.ema_profiles) | {"frozen": frozen}


def whole(state: State, trained: Any) -> Any:
    """The network's weights when what trains is `trained`: state's params, or its ema."""
    return lora.merged(state["frozen"], trained) if "frozen" in state else trained


def make_embedder(
    config: TrainConfig, encoder: T5Encoder
) -> Callable[[Any, Any, Any, Any], dict[str, Any]]:
    """A pure (encoder.params, token ids, token mask, step) -> the text of a batch.

    Where the network has a null_prompt, that stands in the place of condition_dropout of the
    captions, drawn from the config's seed and the step.
    """
    prompt, share = config.stage.network.null_prompt, config.stage.condition_dropout
    null = None if prompt is None else encoder.tokenize([prompt])

    def embed(params, ids, mask, step):
        if null is not None:
            # The loss has split the step's key in five; this is the sixth.
            key = jax.random.fold_in(_step_key(config, step), 5)
            drop = jax.random.bernoulli(key, share, ids.shape[:1])[:, None]
            ids, mask = jnp.where(drop, null.ids, ids), jnp.where(drop, null.mask, mask)
        text = encoder.apply(params, ids, mask)
        return {"text": text.values, "text_mask": text.mask}

    return embed


def make_train_step(
    config: TrainConfig,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, jax.Array]]]:
    """A pure (state, batch) -> (state, metrics); jit it with the state's shardings, state donated.

    batch: what Stage.loss takes. Randomness comes from the config's seed and state's step alone.
    mesh: on which activations are constrained; None leaves them to the compiler. An update that is
    not finite is left out (metrics say `skipped`): all but the step stay as they were.
    """
    gammas = {str(width): averages.gamma_from_sigma_rel(width) for width in config.ema_profiles}
    place = sharding.activations(mesh) if mesh else lambda x, role: x

    def loss_and_grads(state, batch, key, part=None):
        def loss(params):
            return stage.loss(whole(state, params), batch, key, part)

        with placing(place):
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["train"]["params"])
        return metrics, grads

    def accumulated(state, batch, key):
        """Mean over microbatches, one after the other: rows i, i + n, ... are microbatch i."""
        n = config.microbatches
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch
        )
        shapes = jax.eval_shape(loss_and_grads, state, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, x):
            i, part = x
            return jax.tree.map(jnp.add, total, loss_and_grads(state, part, key, (i, n))), None

        total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), parts))
        return jax.tree.map(lambda x: x / n, total)

    def train_step(state, batch):
        train, ema = state["train"], state["ema"]
        compute = accumulated if config.microbatches > 1 else loss_and_grads
        metrics, grads = compute(state, batch, _step_key(config, train["step"]))
        updates, opt_state = optimizer.update(grads, train["opt_state"], train["params"])
        params = optax.apply_updates(train["params"], updates)
        step = train["step"] + 1
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        moved = {
            "params": params,
            "opt_state": opt_state,
            "ema": jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params),
        }
        if gammas:
            moved["profiles"] = {
                width: averages.track(train["profiles"][width], params, step, gamma)
                for width, gamma in gammas.items()
            }
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        finite = jnp.isfinite(jnp.stack([metrics["loss"], *map(metrics.get, NORMS)])).all()
        kept = {key: ema if key == "ema" else train[key] for key in moved}
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
        ema = moved.pop("ema")
        state = {**state, "train": {**moved, "step": step}, "ema": ema}
        return state, metrics | {"skipped": ~finite}

    return train_step


def step_flops(config: TrainConfig, train_step: Any, state: State, batch: dict[str, Any]) -> float:
    """FLOPs of one step, less what remat computes again: that is no progress.

    train_step: the jitted `make_train_step`, which need not be traced again when it is called.
    """
    network = dataclasses.replace(config.stage.network, remat=False)
    if network != config.stage.network:
        stage = Stage(dataclasses.replace(config.stage, network=network))
        train_step = make_train_step(config, stage, make_optimizer(config))
    return flops.count(train_step, state, batch)


def train(
    config: TrainConfig, workdir: str | os.PathLike[str], *, until: int | None = None
) -> bool:
    """Train in `workdir`, from its newest checkpoint if it has one; whether it came to its end.

    workdir: a folder here, or gs://BUCKET/NAME or s3://BUCKET/NAME. until: end (with a checkpoint)
    after this many images instead of config.images. SIGTERM and Ctrl-C save a checkpoint and return
    False. Several processes (jax.distributed) call it alike; a SIGTERM to any of them stops all.
    Raises UserError when skip_limit updates in a row were not finite, with the state before them
    saved.
    """
    from tqdm import tqdm

    workdir = paths.path(workdir)
    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh)
    stage, optimizer = Stage(config.stage), make_optimizer(config)
    encoder = T5Encoder.load(
        config.text_encoder,
        config.text_tokens,
        captions=config.captions,
        int8=config.text_int8,
        shardings=functools.partial(sharding.shardings, mesh=mesh),
    )
    _check_text_width(config.stage, encoder)
    data = batches(
        config.data,
        resolution=config.stage.resolution,
        lowres_resolution=config.stage.lowres_resolution,
        crop=config.crop,
        degradation=config.degradation,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=encoder.tokenizer,
        rows=sharding.process_rows(mesh, config.batch_size),
        workers=config.workers,
    )
    if (workdir / "state.safetensors").exists():
        raise UserError(f"{workdir}: holds a text encoder's run; name another --workdir")
    paths.make_folder(workdir)  # after all that may be wrong with the config
    checkpoints = Checkpoints(workdir, keep=config.keep)
    state, placement = _initial_state(config, stage, optimizer, mesh, checkpoints, data)
    step = int(state["train"]["step"])
    last = config.steps if until is None else min(config.steps, -(-until // config.batch_size))
    embed = jax.jit(make_embedder(config, encoder), out_shardings=sharding.batch_sharding(mesh))
    train_step = jax.jit(
        make_train_step(config, stage, optimizer, mesh),
        in_shardings=(placement, sharding.batch_sharding(mesh)),
        out_shardings=(placement, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    log = None
    profile = _Profile(workdir / "profile", config.profile_steps)
    stop = _StopSignal()
    bar = tqdm(
        total=config.images,
        initial=min(step * config.batch_size, config.images),
        unit="img",
        desc=config.stage.name,
        smoothing=0.05,
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
    )
    with bar, stop, profile:
        ends = step >= last
        while not ends:
            before = time.perf_counter()
            batch = next(data)
            waited = time.perf_counter() - before
            batch = sharding.shard_batch(batch, mesh)
            ids, mask = batch.pop("tokens"), batch.pop("token_mask")
            batch |= embed(encoder.params, ids, mask, np.int32(step))
            if log is None:
                work = step_flops(config, train_step, state, batch)
                log = _log(config, workdir, step, work)
            profile.before_step()
            state, metrics = train_step(state, batch)
            # One step may be under way while the next is prepared; more would only hide progress.
            jax.block_until_ready(log.latest)
            step += 1
            bar.update(min(config.batch_size, config.images - (step - 1) * config.batch_size))
            log.add(metrics, waited)
            ends = step == last or log.diverged or stop.asked(step)
            if ends or _due(step, config.log_every_images, config):
                loss = log.write(step)["loss"]
                bar.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}")
            if ends or _due(step, config.save_every_images, config):
                kept = {"train": state["train"], "ema": state["ema"]}
                checkpoints.save(step, **kept, config=to_json(config), data=data.get_state())
            if config.ema_profiles and (ends or _due(step, config.ema_snapshot_images, config)):
                _snapshot(state["train"]["profiles"], workdir, step)
            if config.preview_every_images and (
                step == last or _due(step, config.preview_every_images, config)
            ):
                drawing = whole(state, state["ema"])
                _preview(config, stage, drawing, encoder, batch, workdir, step)
        checkpoints.close()
    if log is not None:
        log.close()
        if log.diverged:
            raise UserError(
                f"training diverged: the last {config.skip_limit} updates, up to image "
                f"{step * config.batch_size}, were not finite and left out; the weights before "
                "them are saved; lower optimizer.learning_rate or optimizer.clip and run again"
            )
    return step >= last


def _log(config, workdir, step, step_flops) -> TrainingLog:
    return TrainingLog(
        workdir,
        config.stage.name,
        step=step,
        batch_size=config.batch_size,
        step_flops=step_flops,
        skip_limit=config.skip_limit,
        wandb=config.wandb,
        config=to_json(config),
    )


def _initial_state(config, stage, optimizer, mesh, checkpoints, data) -> tuple[State, Any]:
    # Threefry, JAX's default, would take minutes to compile for some hundred parameters.
    key = jax.random.key(config.seed, impl="rbg")

    def init(key):
        return begin(config, optimizer, stage.init(key))

    abstract = jax.eval_shape(init, key)
    placement = sharding.shardings(abstract, mesh)
    place = functools.partial(sharding.shardings, mesh=mesh)
    if not checkpoints.steps():
        if config.init is None:
            return jax.jit(init, out_shardings=placement)(key), placement
        start = functools.partial(begin, config, optimizer)
        start = jax.jit(start, out_shardings=placement, donate_argnums=0)
        return start(init_params(config, place)), placement
    saved = checkpoints.read_config()
    # Fields that were added since it was saved have their defaults.
    there = from_json(StageConfig, saved["stage"], f"{checkpoints.directory.parent}: stage")
    if there != config.stage:
        raise UserError(
            f"{checkpoints.directory.parent}: holds a run of another stage config "
            f"({_difference(to_json(there), to_json(config.stage))}); use its config, or another "
            "folder"
        )
    fixed = [
        ("lora_rank", saved.get("lora_rank", 0), config.lora_rank),
        ("batch_size", saved["batch_size"], config.batch_size),  # a step is so many images
        ("optimizer.name", saved["optimizer"]["name"], config.optimizer.name),
        ("ema_profiles", tuple(saved.get("ema_profiles", ())), config.ema_profiles),
    ]
    if config.lora_rank:
        fixed.append(("init", saved.get("init"), config.init))
    for name, was, now in fixed:
        if was != now:
            raise UserError(
                f"{checkpoints.directory.parent}: holds a run with {name}={was}, not {now}; give "
                "that, or another folder"
            )
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placement
    )
    target.pop("frozen", None)
    _, train_state, ema, data_state = checkpoints.restore(**target)
    data.set_state(data_state)
    state = {"train": train_state, "ema": ema}
    if config.lora_rank:
        state["frozen"] = init_params(config, place)
    return state, placement


def init_params(config: TrainConfig, shardings: Callable[[Any], Any] | None = None) -> Any:
    """The weights of `init`'s stage, in float32; those that a lora_rank leaves alone, in the dtype
    that the network computes in.

    shardings: where they are put; DeepFloyd IF's as they are read. UserError unless they fit the
    network.
    """
    stage, model = config.stage, str(config.init)
    dtype = stage.network.compute_dtype if config.lora_rank else "float32"
    if isinstance(stage.network, IFUNetConfig):
        return deepfloyd.Start(model=model).params(stage, dtype, shardings)
    folder = pretrained.find(model) / stage.name
    if not folder.is_dir():
        raise UserError(f"init={model}: has no stage {stage.name}; it has no folder {folder}")
    params = load_safetensors(folder / "model.safetensors", Stage(stage).abstract())
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    return params if shardings is None else sharding.place(params, shardings(params))


def _step_key(config: TrainConfig, step: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), step)


def _due(step: int, every_images: int, config: TrainConfig) -> bool:
    """Whether this step passed a multiple of `every_images`."""
    b = config.batch_size
    return step * b // every_images > (step - 1) * b // every_images


def _snapshot(profiles: dict[str, Any], workdir: Path, step: int) -> None:
    """Write ema/STEP_WIDTH.safetensors for every width; process 0 does, all take part."""
    folder = workdir / "ema"
    folder.mkdir(exist_ok=True)
    for width, params in profiles.items():
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        if jax.process_index() == 0:
            save_safetensors(folder / f"{step:010d}_{width}.safetensors", params)


def _preview(config, stage, weights, encoder, batch, workdir, step) -> None:
    """Write previews/IMAGES.png: drawn from the prompts (base), or low | drawn | true rows (SR)."""
    prompts, base = list(config.preview_prompts), config.stage.lowres_resolution is None
    if base and not prompts:
        return
    n = len(prompts) if base else min(4, config.batch_size)
    if base:
        text = encoder(prompts)
        batch = {"text": text.values, "text_mask": text.mask}
    negative = None
    if (null := config.stage.network.null_prompt) is not None:
        text = encoder([null] * n)
        negative = Conditioning(text=text.values, text_mask=text.mask)
    negative, params, batch = sharding.fetch((negative, weights, batch))
    if jax.process_index() != 0:
        return
    batch = {k: v[:n] for k, v in batch.items()}
    cond = Conditioning(text=batch["text"], text_mask=batch["text_mask"])
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    options = {"settings": config.stage.sampling, "negative": negative}
    if base:
        rows = stage.sample(params, cond, keys, **options)
        picture = images.grid(images.to_uint8(rows))
    else:
        low, side = images.to_float(batch["lowres"]), batch["image"].shape[1]
        drawn = stage.sample(params, cond, keys, lowres=low, size=side, **options)
        shown = images.to_uint8(images.upsample(low, (side, side)))
        columns = zip(shown, images.to_uint8(drawn), batch["image"], strict=True)
        picture = images.grid([image for row in columns for image in row], columns=3)
    folder = workdir / "previews"
    folder.mkdir(exist_ok=True)
    images.save_png(folder / f"{step * config.batch_size:010d}.png", picture)


class _Profile:
    """While entered, traces `steps` steps after the first three, which compile and warm up."""

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps, self._done, self._on = folder, steps, 0, False
        self._own = tempfile.TemporaryDirectory() if steps and paths.is_remote(folder) else None

    def __enter__(self) -> _Profile:
        return self

    def before_step(self) -> None:
        if self._steps and self._done == 3:
            jax.profiler.start_trace(self._own.name if self._own else str(self._folder))
            self._on = True
        if self._done == 3 + self._steps:
            self.__exit__()
        self._done += 1

    def __exit__(self, *error: Any) -> None:
        if self._on:
            jax.profiler.stop_trace()
            if self._own:
                paths.copy_folder(pathlib.Path(self._own.name), self._folder)
        self._on = False


class _StopSignal:
    """While entered, SIGTERM, and the first SIGINT, make `asked` true and do nothing else.

    So whoever takes a machine away may say so again while the last checkpoint is being written; a
    second Ctrl-C acts as usual. Of several processes each must stop after the same step: JAX has
    its own handler of SIGTERM then, and agrees with the others on one.
    """

    def __init__(self):
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self):
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for s in (signal.SIGTERM, signal.SIGINT):
                self._old[s] = signal.signal(s, self._ask)
        return self

    def __exit__(self, *error):
        for s, old in self._old.items():
            signal.signal(s, old)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every one."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, number, frame):
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._old[number])


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """UserError unless every device gets an equal share of every microbatch."""
    micro = config.batch_size // config.microbatches
    if micro % (parts := sharding.batch_parts(mesh)):
        raise UserError(
            f"batch_size={config.batch_size} / microbatches={config.microbatches} = {micro} "
            f"must be a multiple of the {parts} parts that the mesh's data and fsdp axes make of it"
        )


def _check_text_width(stage: StageConfig, encoder: T5Encoder) -> None:
    if stage.network.text_width not in (0, encoder.width):
        raise UserError(
            f"stage.network.text_width={stage.network.text_width} does not fit the text encoder, "
            f"whose embeddings are {encoder.width} wide"
        )


def _has_fan_in(params: Any) -> Any:
    """Weight decay is for matrices and convolutions, not for biases and norms."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _difference(a: Any, b: Any, where: str = "stage") -> str:
    """The first place where two JSON values differ, for an error message."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key):
                return _difference(a.get(key), b.get(key), f"{where}.{key}")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return _difference(x, y, f"{where}.{i}")
    return f"{where}: {a} there, {b} here"
