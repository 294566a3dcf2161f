import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cascade.models import t5
from cascade.models.t5 import T5Config, T5Decoder, T5EncoderModel, relative_position_bucket
from cascade.text.t5 import T5Encoder, read_folder
from cascade.text.tokenizer import Tokenizer, Tokens

FIXTURE = Path(__file__).parents[1] / "fixtures" / "t5"
TINY = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=3)


@pytest.fixture(scope="module")
def expected():
    return safetensors.numpy.load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def encoder():
    return T5Encoder.load(FIXTURE)


def test_encoder_equals_the_reference_implementation(encoder, expected):
    outputs = encoder.embed(Tokens(ids=expected["ids"], mask=expected["mask"])).values
    assert np.abs(expected["outputs"]).max() > 1  # or the next line would say little
    np.testing.assert_allclose(outputs, expected["outputs"], atol=1e-4)


def test_encoder_equals_torch_live(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(3)
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=90,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=4,
            num_heads=6,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
            layer_norm_epsilon=1e-5,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if p.ndim == 1 else 0.0))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes((FIXTURE / "spiece.model").read_bytes())
    ids = np.random.default_rng(0).integers(2, 90, (2, 70)).astype(np.int32)
    mask = np.arange(70) < np.array([[70], [31]])
    with torch.no_grad():
        outputs = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    ours = T5Encoder.load(tmp_path).embed(Tokens(ids=ids, mask=mask)).values
    np.testing.assert_allclose(ours, outputs.last_hidden_state.numpy(), atol=1e-4)


def test_bfloat16_is_the_same_function_up_to_rounding(expected):
    encoder = T5Encoder.load(FIXTURE, compute_dtype="bfloat16")
    outputs = encoder.embed(Tokens(ids=expected["ids"], mask=expected["mask"])).values
    kernel = encoder.params["layers"]["attention"]["q"]["kernel"]
    error = np.abs(outputs - expected["outputs"])[expected["mask"]]
    assert kernel.dtype == jnp.bfloat16 and outputs.dtype == jnp.float32
    assert 1e-4 < error.mean() < 0.1 * expected["outputs"].std()


def test_padding_cannot_be_seen(encoder, expected):
    ids, mask = expected["ids"][1:], expected["mask"][1:]
    other = np.where(mask, ids, (ids + 7) % 300).astype(np.int32)
    assert (other != ids).any()
    before = encoder.embed(Tokens(ids=ids, mask=mask)).values
    after = encoder.embed(Tokens(ids=other, mask=mask)).values
    np.testing.assert_array_equal(before[mask], after[mask])


def test_buckets_are_exact_when_near_and_logarithmic_up_to_the_maximum():
    distance = np.arange(-300, 301)
    buckets = relative_position_bucket(
        distance, num_buckets=32, max_distance=128, bidirectional=True
    )

    def by_definition(d):
        side, d = (16 if d > 0 else 0), abs(d)
        # In exact arithmetic: the largest k with d >= 8 * 16^(k/8).
        far = max(k for k in range(8) if d**8 >= 8**8 * 16**k) if d >= 8 else 0
        return side + (d if d < 8 else 8 + far)

    assert buckets.tolist() == [by_definition(int(d)) for d in distance]


def test_a_causal_bucket_puts_the_whole_future_in_one():
    buckets = relative_position_bucket(
        np.array([5, 1, 0, -1, -15, -16, -1000]),
        num_buckets=32,
        max_distance=128,
        bidirectional=False,
    )
    assert buckets.tolist() == [0, 0, 0, 1, 15, 16, 31]


def test_decoder_sees_neither_the_future_nor_what_is_masked():
    decoder = T5Decoder(TINY, nnx.Rngs(0))
    key = jax.random.key(0)
    inputs, encoded = jax.random.normal(key, (1, 6, 8)), jax.random.normal(key, (1, 5, 8))
    mask = jnp.array([[True, True, True, False, False]])
    run = jax.jit(lambda x, e: decoder(x, e, mask))
    before = run(inputs, encoded)
    np.testing.assert_array_equal(before, run(inputs, encoded.at[:, 3:].add(1.0)))
    after = run(inputs.at[:, 4:].add(1.0), encoded)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])
    assert not np.allclose(before, run(inputs, encoded.at[:, 0].add(1.0)))


def test_every_parameter_of_every_layer_gets_a_gradient():
    graphdef, params = nnx.split(T5EncoderModel(TINY, nnx.Rngs(0)))
    ids = jnp.arange(40).reshape(2, 20)
    run = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(ids, ids >= 0) ** 3)))
    gradients = nnx.to_pure_dict(run(params))
    for path, layers in jax.tree_util.tree_leaves_with_path(gradients.pop("layers")):
        assert (jnp.abs(layers).max(range(1, layers.ndim)) > 0).all(), jax.tree_util.keystr(path)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert gradient.any(), jax.tree_util.keystr(path)


def test_stacked_layers_differ_and_a_new_head_looks_nearby():
    model = T5EncoderModel(TINY, nnx.Rngs(0))
    kernel = model.layers.feed_forward.wo.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])
    behind, ahead = model.relative_attention_bias[:16], model.relative_attention_bias[17:]
    assert (jnp.diff(behind, axis=0) < 0).all() and (jnp.diff(ahead, axis=0) < 0).all()
    prefers_ahead = (ahead[0] > behind[1]).tolist()  # at distance 1
    assert prefers_ahead == [False, True, False]


def test_the_largest_encoder_has_its_published_size_and_needs_no_memory():
    xxl = T5Config(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64)
    state = nnx.state(nnx.eval_shape(lambda: T5EncoderModel(xxl, nnx.Rngs(0))))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(state)]
    assert sum(sizes) == pytest.approx(4.7623e9, rel=1e-4)


def test_config_reads_hugging_face_and_refuses_the_first_t5():
    fields = json.loads((FIXTURE / "config.json").read_text())
    config = T5Config.from_hf_dict(fields)
    assert (config.d_model, config.num_layers) == (fields["d_model"], fields["num_layers"])
    assert T5Config.from_hf_dict(config.to_hf_dict()) == config
    with pytest.raises(ValueError, match="gated-gelu"):
        T5Config.from_hf_dict(fields | {"feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="needs d_ff, num_heads"):
        T5Config.from_hf_dict({k: v for k, v in fields.items() if k not in ("d_ff", "num_heads")})


def test_one_compiled_program_serves_within_a_larger_one(encoder, expected):
    tokens = Tokens(ids=expected["ids"], mask=expected["mask"])
    inside = jax.jit(lambda p, i, m: encoder.apply(p, i, m).values + 1.0)
    outputs = inside(encoder.params, tokens.ids, tokens.mask)
    np.testing.assert_allclose(outputs, encoder.embed(tokens).values + 1.0, atol=1e-5)


def test_reading_gives_float32_from_a_float16_file():
    config, params, spiece = read_folder(FIXTURE)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert T5Encoder(config, params, Tokenizer(spiece, 5)).max_tokens == 5


def test_heads_begin_by_looking_one_way_half_of_them_ahead():
    config = T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=8, d_kv=2)
    bias = t5._position_bias(config, t5._neighbourly_table(config), 9, bidirectional=True)
    back, ahead = np.tril(np.ones((9, 9)), -1), np.triu(np.ones((9, 9)), 1)
    weights = jax.nn.softmax(bias[0], axis=-1)
    wrong = [np.sum(w * way, axis=-1) for w, way in zip(weights, [ahead, back] * 4, strict=True)]
    assert np.max(wrong[:6]) < 0.02  # the widest two have no room ahead or behind at the ends
    right = [np.sum(w * way, axis=-1)[4] for w, way in zip(weights, [back, ahead] * 4, strict=True)]
    assert np.min(right) > 0.3
