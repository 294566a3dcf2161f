"""One step of training as a pure function of state and batch, whatever the job is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cascade.devices import flops, sharding
from cascade.models import placing
from cascade.training import ema as averages
from cascade.training.job import Job

State = dict[str, Any]
NORMS = ("grad_norm", "update_norm", "param_norm")


def begin(job: Job, optimizer: optax.GradientTransformation, params: Any) -> State:
    """The state of a run with these weights: all that changes while training.

    {train: {params, opt_state, step}, ema}, of what trains. With ema_profiles, train also has the
    power-function average of each width, named by it. Where something is frozen, "frozen" holds it;
    that is in no checkpoint.
    """
    trained, frozen = job.trainable.split(params, jax.random.key(job.seed, impl="rbg"))
    frozen = jax.tree.map(lambda x: x.astype(jnp.dtype(job.frozen_dtype)), frozen)
    train = {"params": trained, "opt_state": optimizer.init(trained), "step": jnp.int32(0)}
    if job.ema_profiles:
        train["profiles"] = {str(w): jax.tree.map(jnp.copy, trained) for w in job.ema_profiles}
    state = {"train": train, "ema": jax.tree.map(jnp.copy, trained)}
    return state | ({"frozen": frozen} if frozen else {})


def whole(job: Job, state: State, trained: Any) -> Any:
    """All parameters when what trains is `trained`: state's params, or its ema."""
    return job.trainable.whole(trained, state.get("frozen", {}))


def make_train_step(
    job: Job, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """A pure (state, batch) -> (state, metrics); jit it with the state's shardings, state donated.

    Where the job's minutes end it, a third argument is the number of steps that the run will have.
    batch: what the job's loss takes. Randomness comes from the job's seed and state's step alone.
    mesh: on which activations are constrained; None leaves them to the compiler. An update that is
    not finite is left out (metrics say `skipped`): all but the step stay as they were.
    """
    gammas = {str(width): averages.gamma_from_sigma_rel(width) for width in job.ema_profiles}
    place = sharding.activations(mesh) if mesh else lambda x, role: x

    def loss_and_grads(state, batch, key, part=None):
        def loss(params):
            return job.loss(whole(job, state, params), batch, key, part)

        with placing(place):
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["train"]["params"])
        return metrics, grads

    def accumulated(state, batch, key):
        """Mean over microbatches, one after the other: rows i, i + n, ... are microbatch i."""
        n = job.microbatches
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

    def train_step(state, batch, steps=None):
        rule = optimizer if steps is None else job.transformation(steps)
        train, ema = state["train"], state["ema"]
        compute = accumulated if job.microbatches > 1 else loss_and_grads
        metrics, grads = compute(state, batch, step_key(job, train["step"]))
        updates, opt_state = rule.update(grads, train["opt_state"], train["params"])
        params = optax.apply_updates(train["params"], updates)
        step = train["step"] + 1
        decay = jnp.minimum(job.ema_decay, (1 + step) / (10 + step))
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
        finite &= _all_finite(moved)  # all that is saved: the averages, too
        kept = {key: ema if key == "ema" else train[key] for key in moved}
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
        ema = moved.pop("ema")
        state = {**state, "train": {**moved, "step": step}, "ema": ema}
        return state, metrics | {"skipped": ~finite}

    return train_step


def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
    # On CPUs XLA would put the conjunction of all leaves, cheap as it is, into the fusion of every
    # leaf that it decides about, so that compilation took a time that is quadratic in the leaves.
    # It does not repeat a square root.
    return jnp.sqrt(finite.astype(jnp.float32)) > 0


def step_key(job: Job, step: Any) -> jax.Array:
    """The key of all randomness of the step with this number, counted from 0."""
    return jax.random.fold_in(jax.random.key(job.seed), step)


def step_flops(job: Job, train_step: Any, *given: Any) -> float:
    """FLOPs of one step, less what remat computes again: that is no progress.

    train_step: the jitted `make_train_step`, which need not be traced again when it is called with
    what is given.
    """
    plain = job.with_remat(False)
    if plain != job:
        train_step = make_train_step(plain, plain.transformation())
    return flops.count(train_step, *given)
