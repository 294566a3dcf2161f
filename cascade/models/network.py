"""A network without its parameters, as a pure function of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade.models.conditioning import Conditioning

Params = dict[str, Any]


class Network:
    """A config's network without its parameters: they go in and come out as nested dicts of arrays.

    Keys are strings at every depth, also where the module holds a list: joined by "/" they name a
    parameter in sharding rules and safetensors files: "encoder/0/rest/residual/conv1/kernel" is
    [blocks, 3, 3, in, out], since equal blocks are stacked along a leading axis ("rest", "blocks").
    """

    def __init__(self, config: Any):
        self.config = config
        self._graphdef, self._abstract = _traced(config)
        self._paths = [path for path, _ in nnx.to_flat_state(self._abstract)]

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters. The same key gives the same ones."""
        keys = jax.random.split(key, len(self._paths))
        return _named(nnx.state(self.config.build(_Keys(iter(keys).__next__))))

    def abstract(self) -> Params:
        """The shapes and dtypes of `init`, without any memory."""
        return _named(self._abstract)

    def __call__(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        cond: Conditioning,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w d"]:
        """Of a denoiser. x: noisy images. time: [b] in 0..1000. key: for dropout, else there is
        none."""
        return self.bind(params)(x, time, cond, key)

    def bind(self, params: Params) -> Any:
        """The module that holds these parameters, to be called as its own class says."""
        state = nnx.from_flat_state((path, _at(params, path)) for path in self._paths)
        return nnx.merge(self._graphdef, state)


@functools.cache
def _traced(config: Any) -> tuple[Any, Any]:
    """The network's graph and the shapes of its parameters: seconds of tracing, once a config."""
    return nnx.split(nnx.eval_shape(lambda: config.build(_Keys(lambda: jax.random.key(0)))))


class _Keys(nnx.Rngs):
    """Keys from elsewhere. nnx.Rngs counts, and makes a key of each number: a third of what there
    is to compile, and in a trace the square of that number (10 seconds for DeepFloyd IF)."""

    def __init__(self, draw: Callable[[], Key[Array, ""]]):
        super().__init__()
        self._draw = draw

    def params(self) -> Key[Array, ""]:
        return self._draw()


def _named(state: Any) -> Params:
    """nnx.State -> nested dict; nnx names the items of a list by integers."""
    params: Params = {}
    for path, variable in nnx.to_flat_state(state):
        node = params
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = variable.get_value()
    return params


def _at(params: Params, path: tuple[Any, ...]) -> Array:
    node: Any = params
    for name in path:
        node = node[str(name)]
    return node
