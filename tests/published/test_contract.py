"""What a stage asks of a network (`models.network.NetworkConfig`), of the public ones."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.random_weights import noise

from cascade import testing
from cascade.models import Network, NetworkConfig, Signals, Widths
from cascade.models.layers import Remat
from cascade.published.deepfloyd.unet import IFLevel, IFUNetConfig
from cascade.published.x4_upscaler.unet import UpscalerLevel, UpscalerUNetConfig

STAGE_1 = IFUNetConfig(
    levels=(IFLevel(width=8, blocks=1), IFLevel(width=16, blocks=1, attention="text")),
    text_width=12,
    cross_width=32,
    emb_width=20,
    head_width=8,
    pool_heads=2,
    groups=4,
)
CONFIGS = {
    "IF stage I": STAGE_1,
    "IF stage II": dataclasses.replace(STAGE_1, lowres=True, residual_scale=0.7071),
    "x4 upscaler": UpscalerUNetConfig(
        levels=(
            UpscalerLevel(width=8, blocks=1),
            UpscalerLevel(width=16, blocks=1, attention="text"),
        ),
        noise_levels=10,
        text_width=12,
        heads=2,
        groups=4,
    ),
}
B, SIDES = 2, (4, 6)


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


def inputs(config):
    """(x, time, Signals) of the widths that the config asks for."""
    channels = config.widths.channels
    x = jnp.asarray(noise(1, (B, *SIDES, config.in_channels)))
    signals = Signals(
        channels=(jnp.asarray(noise(2, (B, *SIDES, channels))),) if channels else (),
        vectors=(jnp.array([[3.0], [7.0]]),) if channels else (),
        tokens=jnp.asarray(noise(3, (B, 5, config.widths.tokens))),
        mask=jnp.ones((B, 5), bool),
    )
    return x, jnp.array([990.0, 7.0]), signals


def differently(**changes):
    return lambda x, time, signals: (x, time, dataclasses.replace(signals, **changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_is_float32_of_the_shape_of_x_and_of_nothing_but_the_inputs(config, dtype):
    assert isinstance(config, NetworkConfig) and hash(config) == hash(dataclasses.replace(config))
    config = dataclasses.replace(config, compute_dtype=dtype)
    network = Network(config, config.widths)
    params, told = testing.lively(network), inputs(config)
    assert jax.tree.map(jnp.shape, jax.eval_shape(network.init, jax.random.key(0))) == jax.tree.map(
        jnp.shape, params
    )
    run = jax.jit(network.__call__)
    output = run(params, *told)
    assert output.shape == (B, *SIDES, config.out_channels) and output.dtype == jnp.float32
    assert jnp.isfinite(output).all()
    np.testing.assert_array_equal(output, run(params, *told, jax.random.key(1)))
    # Every picture is a matter of its own row, and of all that its network is told.
    flipped = jax.tree.map(lambda x: x[::-1], told)
    np.testing.assert_allclose(output, run(params, *flipped)[::-1], atol=1e-5)
    for leaf in jax.tree.leaves((*told[:2], dataclasses.replace(told[2], mask=()))):
        changed = jax.tree.map(lambda x, leaf=leaf: x - 1 if x is leaf else x, told)
        assert (run(params, *changed) != output).any()


@pytest.mark.parametrize(
    "kind,policies",
    [("IF stage I", ["nothing_saveable"]), ("x4 upscaler", list(typing.get_args(Remat)[1:]))],
)
def test_policies_of_remat_give_the_same_gradients(kind, policies):
    """Of one level, for less to compile: the tests of each network count the blocks of several.
    Policies are JAX's, and IF's second stage is the network of the first."""
    config = dataclasses.replace(CONFIGS[kind], levels=CONFIGS[kind].levels[-1:])

    def gradients(policy):
        network = Network(dataclasses.replace(config, remat=policy), config.widths)

        def loss(params):
            return jnp.mean(jnp.square(network(params, *inputs(config))))

        return jax.jit(jax.value_and_grad(loss))(testing.lively(network))

    exact, *again = map(gradients, [False, *policies])
    assert again and exact[0] > 0
    for found in again:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, exact
        )


@pytest.mark.parametrize("kind", ["channels", "tokens"])
def test_widths_that_are_not_its_own_are_refused_by_field(config, kind):
    wrong = dataclasses.replace(config.widths, **{kind: getattr(config.widths, kind) + 1})
    field = {"channels": "lowres", "tokens": "text_width"}[kind]
    message = rf"{type(config).__name__} .*{field}.* is told .*{kind}=.* give .*{kind}="
    with pytest.raises(ValueError, match=message):
        config.check(wrong)
    with pytest.raises(ValueError, match=message):
        Network(config, wrong)
    config.check(config.widths)
    for nothing in (Widths(), Widths(channels=3)):
        with pytest.raises(ValueError, match=message):
            config.check(nothing)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x, time, s: (x[:, :, :-1], time, s), "sides must be multiples of 2"),
        (differently(channels=(jnp.ones((B, *SIDES, 5)),)), r"Signals.channels must be .* in all"),
        (differently(channels=(jnp.ones((B, 4, 4, 3)),)), r"Signals.channels must be .* in all"),
        (differently(vectors=(jnp.ones((B, 2)),)), r"Signals.vectors, .* must be .*got \[\(2, 2"),
        (differently(vectors=(jnp.ones((B, 1)),) * 2), "Signals.vectors, .* must be"),
        (differently(tokens=jnp.ones((B, 5, 13))), r"Signals.tokens must be \[b, l, 12\]"),
        (differently(tokens=None, mask=None), r"Signals.tokens must be \[b, l, 12\]"),
    ],
)
def test_what_it_cannot_be_called_with_is_refused_by_field(config, change, message):
    network = Network(config, config.widths)
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(network.__call__, network.abstract(), *change(*inputs(config)))
    assert type(config).__name__ in str(error.value)


@pytest.mark.parametrize("name", ["IF stage II", "x4 upscaler"])
def test_a_picture_without_the_level_of_its_noise_is_refused(name):
    network = Network(CONFIGS[name], CONFIGS[name].widths)
    x, time, signals = inputs(CONFIGS[name])
    with pytest.raises(ValueError, match="Signals.vectors, .* must be .*, got none"):
        signals = dataclasses.replace(signals, vectors=())
        jax.eval_shape(network.__call__, network.abstract(), x, time, signals)
