"""Where networks meet mathematics: a Stage is one diffusion model.

A base stage draws from text; a super-resolution stage from text and a smaller picture; what else a
stage is told, and what it diffuses, its config says. Parameters are nested dicts of arrays and
always arguments, so a Stage itself is a value without state: `init` makes parameters, `loss` scores
them on a batch, `denoiser` makes of them what samplers take, `sample` draws pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from cascade.diffusion import denoise, loss, process, samplers
from cascade.models import Network, Signals, placing
from cascade.models.signals import together
from cascade.stage.conditions import Keys
from cascade.stage.config import StageConfig
from cascade.stage.settings import Sampling
from cascade.stage.steering import Start, Steering

Values = Mapping[str, tuple[Any, ...]]
"""What a stage is told: condition's name -> arrays with a row an example."""

Each = Callable[[int, int, Callable[[], Array] | None], None]
"""(i, n, thought): i of n steps are taken; `thought` gives what the pictures are thought to be by
now, [b, h, w, 3] in [-1, 1], and is None before the first step."""


class Stage:
    """One diffusion model: `init`, `loss`, `denoiser` (and `sample`, which uses the last).

    Its parameters are {"network", "conditions": {name: ...}, "space"}, without those that hold
    nothing; "space" is frozen.
    """

    def __init__(self, config: StageConfig):
        self.config = config
        self.network = Network(config.network, config.widths)
        self.conditions = {c.name: Network(c, config.network) for c in config.conditions}

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters, as nested dicts of arrays."""
        k_network, k_space, *rest = jax.random.split(key, 2 + len(self.conditions))
        modules = zip(self.conditions.items(), rest, strict=True)
        return _held(
            self.network.init(k_network),
            {name: module.init(k) for (name, module), k in modules},
            self.config.space.init(k_space),
        )

    def abstract(self) -> dict[str, Any]:
        """The shapes of `init`'s result, without memory."""
        return _held(
            self.network.abstract(),
            {name: module.abstract() for name, module in self.conditions.items()},
            self.config.space.abstract(),
        )

    def loss(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        part: loss.Part | None = None,
        *,
        between: tuple[Any, Any] | None = None,
        dropout: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The training loss of a batch, and scalars worth logging.

        batch: what the config's space and conditions take, see `StageConfig.batch_shapes`.
        part: (i, n) if it is rows i, i + n, ... of a batch n times as large: the mean of the parts'
        losses is then that batch's, dropout masks aside.
        between: the range of the times of noise, a part of [0, 1], which None is the whole of.
        dropout: whether the network drops channels; conditions are dropped in either case.
        """
        config = self.config
        k_drop, k_level, k_augment, k_loss, k_dropout = jax.random.split(key, 5)
        x0 = config.space.encode(batch)
        keys = Keys(k_drop, k_level, k_augment)
        values = {c.name: c.of_batch(batch, keys, part, x0.shape[1:]) for c in config.conditions}
        if part is not None:
            k_dropout = jax.random.fold_in(k_dropout, part[0])

        def predict(x_t, logsnr):
            dropped = k_dropout if dropout else None
            prediction, gamma = self._predict(params, x_t, logsnr, values, dropped)
            return prediction if gamma is None else (prediction, gamma)

        return loss.denoising_loss(
            predict,
            x0,
            kind=config.prediction,
            schedule=config.schedule,
            loss=config.loss,
            variance=config.variance,
            key=k_loss,
            part=part,
            between=between,
            where=_where(config, values),
        )

    def denoiser(
        self,
        params: Any,
        values: Values,
        *,
        guidance: denoise.Weight | Callable[[Float[Array, " b"]], Float[Array, " b"]] = 1.0,
        rescale: float = 0.0,
        threshold: denoise.Threshold,
        negative: Values | None = None,
        around: Callable[[denoise.Denoiser], denoise.Denoiser] | None = None,
    ) -> denoise.Denoiser:
        """(x_t, logsnr) -> x0, guided in one batched pass of the network, then thresholded.

        values: of all conditions. negative: values that guidance moves away from; of conditions
        that it leaves out, their null. ValueError for a condition that has none.
        guidance: a weight, or the weight as a function of the log-SNR; the Python number 1.0 runs
        the conditional half alone. rescale: phi of `denoise.rescale`. around: what is put around
        the guided denoiser before the threshold, as `Start` has it.
        It is `denoise.Detailed`, with a variance if the network has learned that.
        """
        away = dict(negative or {})
        if strange := set(away) - set(self.conditions):
            raise ValueError(
                f"negative: stage {self.config.name} is told {', '.join(self.conditions)}, not "
                f"{', '.join(sorted(strange))}"
            )
        kind = self.config.prediction
        plain = isinstance(guidance, (int, float)) and guidance == 1

        def estimate(prediction, gamma, x_t, logsnr):
            x0_hat = process.to_x0(prediction, kind, x_t, logsnr)
            return denoise.Estimate(x0_hat, x0_hat, gamma)

        def conditional(x_t, logsnr):
            prediction, gamma = self._predict(params, x_t, logsnr, values)
            return estimate(prediction, gamma, x_t, logsnr)

        if plain:
            both: Values = {}
        else:
            without = {
                c.name: away[c.name] if c.name in away else c.null(values[c.name])
                for c in self.config.conditions
            }
            both = jax.tree.map(
                lambda c, n: jnp.concatenate([c, n]), dict(values), _like(values, without)
            )

        def guided(x_t, logsnr):
            twice = jnp.concatenate([x_t, x_t]), jnp.concatenate([logsnr, logsnr])
            prediction, gamma = self._predict(params, *twice, both)
            towards, from_here = jnp.split(prediction, 2)
            w = guidance(logsnr) if callable(guidance) else guidance
            mixed = denoise.guide(towards, from_here, w)
            if rescale > 0:
                mixed = denoise.rescale(mixed, towards, rescale)
            # Guidance is for the mean: the variance is that of the conditional half.
            gamma = None if gamma is None else gamma[: len(x_t)]
            return estimate(mixed, gamma, x_t, logsnr)

        denoiser = denoise.Detailed(conditional if plain else guided)
        return denoise.thresholded(denoiser if around is None else around(denoiser), threshold)

    def sample(
        self,
        params: Any,
        given: Values,
        keys: Key[Array, " b"],
        *,
        settings: Sampling,
        negative: Values | None = None,
        sides: tuple[int, int] | None = None,
        steering: Steering | None = None,
        place: Callable[[Array, str], Array] | None = None,
        noise: Float[Any, "b _ _ _"] | None = None,
        each: Each | None = None,
    ) -> Float[Array, "b h w 3"]:
        """Draw one picture in [-1, 1] for each row of `given`, by one compiled program.

        given: for every condition what its `of_prompts` or `of_lowres` gave, but for those to which
        the steering tells it. negative: the same, of
        those that guidance moves away from; see `denoiser`. keys: [b], one a picture; a picture
        depends on its own key and row alone. sides: height and width of the pictures drawn, if not
        the stage's resolution (crops). steering: begin from elsewhere, change x after every step,
        or what x0 is thought to be.
        place: puts activations on several devices, as for `models.placing`, and as the role "run"
        what is carried from step to step; programs are kept by its hash. noise: N(0, 1) to begin
        from in the stage's space, in place of that of the keys. each: called before the first step
        and after every one.
        """
        config = self.config
        config.check(settings)
        steered = {
            c.name: c.of_steering(steering, len(keys), config.space.shape(sides))
            for c in config.conditions
            if given.get(c.name) is None
        }
        given = {k: v for k, v in {**given, **steered}.items() if v is not None}
        if missing := {c.name for c in config.conditions} ^ set(given):
            raise ValueError(
                f"stage {config.name} is told {', '.join(self.conditions) or 'nothing'}: give "
                f"exactly that, not more or less ({', '.join(sorted(missing))})"
            )
        if steering is not None:
            steering.check(settings.steps)
        shape = (len(keys), *config.space.shape(sides))
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise: must have the shape {list(shape)}, got {list(noise.shape)}")
        # Compiled for everything but these numbers.
        scalars = {
            "guidance": jnp.float32(settings.guidance),
            "aug_level": jnp.float32(settings.aug_level),
            "own_noise": jnp.bool_(noise is None),
        }
        settings = dataclasses.replace(
            settings, guidance=0.0 if settings.guided else 1.0, aug_level=0.0
        )
        trained = {name: part for name, part in params.items() if name != "space"}
        inputs = (dict(given), dict(negative or {}), steering, keys, scalars)
        run = samplers.begun(
            jnp.zeros(shape) if noise is None else jnp.asarray(noise), settings.sampler
        )
        n = _steps(config, settings, steering, run.x)
        decode = functools.partial(config.space.decode, params.get("space"))
        # Within a program that is being traced, the steps are a part of that, of a known number.
        carry = _carried if isinstance(keys, Tracer) else _sample
        parts = [(0, n)] if each is None else [(i, i + 1) for i in range(n)]
        if each is not None:
            each(0, n, None)
        with placing(place) if place else contextlib.nullcontext():
            run = _placed(run, place)
            for first, last in parts:
                before = run
                run = carry(config, settings, place, trained, *inputs, run, (first, last))
                if each is not None and first > 0:  # one step is under way while that is told of
                    each(first, n, functools.partial(decode, before.x0_hat))
        if each is not None:
            each(n, n, functools.partial(decode, run.x))
        return decode(run.x)

    def _signals(self, params: Any, values: Values) -> Signals:
        own = params.get("conditions", {})
        return together(
            [
                self.conditions[c.name](own.get(c.name, {}), *values[c.name])
                for c in self.config.conditions
            ]
        )

    def _predict(self, params, x_t, logsnr, values, key=None):
        """-> (prediction in the space of config.prediction, gamma), gamma None unless learned."""
        signals, time = self._signals(params, values), self.config.time(logsnr)
        prediction, gamma = self.network(params["network"], x_t, time, signals, key), None
        if self.config.variance is not None:
            prediction, gamma = _split_variance(prediction)
        for condition in self.config.conditions:
            if (guess := condition.guess(values[condition.name])) is not None:
                prediction += guess
        return prediction, gamma


def _where(config: StageConfig, values: Values) -> Array | None:
    """Where errors count: where all conditions that say so agree."""
    said = [c.where(values[c.name]) for c in config.conditions]
    told = [where for where in said if where is not None]
    return functools.reduce(jnp.multiply, told) if told else None


def _held(network: Any, conditions: dict[str, Any], space: Any) -> dict[str, Any]:
    """The parts that hold parameters."""
    conditions = {name: params for name, params in conditions.items() if params}
    parts = {"network": network, "conditions": conditions, "space": space}
    return {name: part for name, part in parts.items() if part}


def _like(values: Values, others: Values) -> dict[str, Any]:
    """The same arrays in the tuples that `values` has."""
    treedef = jax.tree.structure(dict(values))
    return jax.tree.unflatten(treedef, jax.tree.leaves(dict(others)))


def _split_variance(output: Float[Array, "b h w c2"]) -> tuple[Array, Array]:
    """Network output -> (prediction, gamma): the second half of its channels runs over [-1, 1]."""
    prediction, variance = jnp.split(output, 2, axis=-1)
    return prediction, (variance + 1) / 2


def _carried(
    config, settings, place, params, given, negative, steering, keys, scalars, run, steps
) -> samplers.Run:
    """A run in the stage's space, carried on by these steps; the first step makes what it begins
    from."""
    stage, (b, *shape) = Stage(config), run.x.shape
    k_noise, k_steps, k_augment = jnp.moveaxis(
        jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
    )
    level = jnp.broadcast_to(scalars["aug_level"], (b,))
    values = {
        c.name: c.drawn(given[c.name], k_augment, tuple(shape), level) for c in config.conditions
    }
    times = settings.grid(settings.steps, config.schedule)
    starts = config.schedule.logsnr(times[:-1])

    def weight(logsnr):
        return settings.guidance_plan(scalars["guidance"], logsnr, starts)

    own = samplers.initial_noise(k_noise, tuple(shape))
    x = jnp.where(scalars["own_noise"], own, run.x)
    start = Start(x, times)
    if steering is not None:
        start = steering.start(x, config.schedule, times)
    denoiser = stage.denoiser(
        params,
        values,
        guidance=weight if settings.guided else 1.0,
        rescale=settings.guidance_rescale,
        threshold=settings.threshold,
        negative=negative,
        around=start.around,
    )
    run = _placed(run._replace(x=jnp.where(steps[0] == 0, start.x, run.x)), place)
    run = samplers.walk(
        denoiser,
        run,
        steps,
        schedule=config.schedule,
        times=start.times,
        step=settings.sampler,
        keys=k_steps,
        after_step=start.after_step,
        rises=start.rises,
    )
    return _placed(run, place)


_sample = jax.jit(_carried, static_argnums=(0, 1, 2))
"""The same, compiled for any of the steps."""


def _placed(run: samplers.Run, place: Callable[[Array, str], Array] | None) -> samplers.Run:
    """The run with its pictures where `place` puts them."""
    return run if place is None else jax.tree.map(lambda x: place(x, "run"), run)


def _steps(
    config: StageConfig, settings: Sampling, steering: Steering | None, x: Float[Array, " b *d"]
) -> int:
    """How many steps there are to take; of a steered run, those that are left."""
    if steering is None:
        return settings.steps

    def times(steering, x):
        return steering.start(
            x, config.schedule, settings.grid(settings.steps, config.schedule)
        ).times

    return jax.eval_shape(times, steering, x).shape[0] - 1
