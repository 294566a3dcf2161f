"""FID's Inception and CLIP against what torch-fidelity, pytorch-fid and transformers computed.

Weights are random functions of their names; features.npz has what the references made of them.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures.feature_networks import SHAPES, clip_folder, inception_tensors

from cascade.errors import UserError
from cascade.evaluation import features
from cascade.models import InceptionConfig, Network
from cascade.models.inception import resizing
from cascade.published import clip, inception

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = np.load(FIXTURES / "features.npz")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.numpy.save_file(inception_tensors(), file)
    return file


def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("like", ["torch-fidelity", "pytorch-fid"])
def test_inception_has_the_features_of_the_reference(like, weights):
    network = Network(InceptionConfig(like=like))
    found = jax.jit(network.__call__)(inception.read(weights), jnp.asarray(pictures()))
    expected, other = (RECORDED[n] for n in (like, *({"torch-fidelity", "pytorch-fid"} - {like})))
    scale = expected.std()
    assert np.abs(found - expected).max() < 1e-4 * scale < 0.1 * np.abs(found - other).max()


def test_features_of_inception_tell_their_way_and_their_weights_apart(weights):
    one, other = (features.of_inception(weights, way) for way in ("torch-fidelity", "pytorch-fid"))
    assert one.name == "inception (torch-fidelity)" and other.name == "inception (pytorch-fid)"
    assert one.apply.config.like == "torch-fidelity" and other.apply.config.like == "pytorch-fid"
    assert one.digest == hashlib.sha256(weights.read_bytes()).hexdigest() == other.digest
    assert (one.suffix, one.width) == ("", 2048)


def test_pictures_are_resized_as_by_tensorflow_1_and_by_pytorch():
    """2 -> 4: without centres every second pixel is one of the old, and the last is repeated; with
    them a new pixel is a quarter away from the next old one."""
    ramp = np.array([0.0, 4.0])
    np.testing.assert_array_equal(resizing(2, 4, centred=False) @ ramp, [0, 2, 4, 4])
    np.testing.assert_array_equal(resizing(2, 4, centred=True) @ ramp, [0, 1, 3, 4])
    assert np.allclose(resizing(700, 299, centred=False).sum(axis=1), 1)


@pytest.mark.parametrize(
    "change,said",
    [
        (
            lambda t: t.pop("Mixed_7c.branch_pool.bn.bias"),
            "Mixed_7c.branch_pool.bn.bias is missing",
        ),
        (
            lambda t: t.update({"Conv2d_1a_3x3.conv.weight": np.ones((32, 1, 3, 3), np.float32)}),
            "Conv2d_1a_3x3.conv.weight is [32, 1, 3, 3], expected [32, 3, 3, 3]",
        ),
        (
            lambda t: t.update({"AuxLogits.fc.weight": np.ones((3, 3), np.float32)}),
            "AuxLogits.fc.weight is left over",
        ),
    ],
)
def test_inceptions_weights_are_read_whole_or_not_at_all(change, said, tmp_path):
    tensors = inception_tensors()
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as e:
        inception.read(tmp_path / "other.safetensors")
    assert said in str(e.value) and "weights_only=True" in str(e.value)


def test_the_error_says_where_people_get_the_weights_and_pickles_are_not_read(tmp_path):
    with pytest.raises(UserError, match="https://github.com/mseitzer/pytorch-fid/releases"):
        inception.read(tmp_path / "inception.safetensors")
    (tmp_path / "theirs.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match="pickled, which is never read.*weights_only=True"):
        inception.read(tmp_path / "theirs.pth")


def clip_inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 97, (2, 12))
    ids[0, 6:] = 98
    ids[1, -1] = 98
    pixels = rng.standard_normal((2, 3, 12, 12)).astype(np.float32)
    return jnp.asarray(ids.astype(np.int32)), jnp.asarray(pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_has_the_embeddings_of_the_reference(activation, tmp_path):
    network = clip.published(clip_folder(tmp_path, activation))
    module = Network(network.config).bind(network.read("float32"))
    ids, pixels = clip_inputs()
    text, image = module.text(ids), module.image(pixels)
    assert np.allclose(text, RECORDED[f"text {activation}"], atol=1e-5)
    assert np.allclose(image, RECORDED[f"image {activation}"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SHAPES if "/" in name])
def test_published_clips_fit_to_the_last_tensor(name, tmp_path):
    """The sizes of the four are read from a config.json with what differs from the smallest."""
    shapes = SHAPES[name]
    vision, text = (shapes[f"{t}_model.embeddings.position_embedding.weight"] for t in SIDES)
    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    fields = {"model_type": "clip", "projection_dim": shapes["text_projection.weight"][0]}
    for tower, (_, width) in (("vision", vision), ("text", text)):
        layers = {n.split(".")[3] for n in shapes if n.startswith(f"{tower}_model.encoder.layers")}
        fields[f"{tower}_config"] = {
            "hidden_size": width,
            "intermediate_size": shapes[f"{tower}_model.encoder.layers.0.mlp.fc1.bias"][0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // 64,
            "patch_size": patch,
        }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    published = clip.published(tmp_path)
    published.fit(name, shapes)
    with pytest.raises(UserError, match="visual_projection.weight is missing"):
        published.fit(name, {k: v for k, v in shapes.items() if k != "visual_projection.weight"})


SIDES = ("vision", "text")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return clip.load(clip_folder(tmp_path_factory.mktemp("clip") / "tiny", tokenizer=True))


def test_a_loaded_clip_embeds_pictures_of_any_size_and_texts(tiny):
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    prepared = tiny.prepare(wide)
    assert prepared.shape == (12, 12, 3) and prepared.dtype == np.uint8
    found = tiny.images(tiny.params, jnp.stack([prepared, prepared[::-1]]))
    texts = tiny.texts(["a red circle", "a blue square", "a red circle"])
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(texts[0], texts[2])
    assert np.abs(texts[0] - texts[1]).max() > 1e-3 and tiny.scale > 0


def test_a_picture_is_prepared_as_openai_has_it(tiny):
    """Its middle is taken, after its shorter side was resized with antialiasing."""
    picture = np.zeros((24, 48, 3), np.uint8)
    picture[:, 12:36] = 200
    assert np.abs(tiny.prepare(picture)[:, 1:-1].astype(int) - 200).max() < 20
    stripes = np.zeros((48, 48, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(tiny.prepare(stripes).astype(int) - 127).max() < 20


def test_normalisation_is_that_of_the_preprocessor(tiny, tmp_path):
    clip_folder(tmp_path, tokenizer=True)
    fields = {"image_mean": [0, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5], "crop_size": 12}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    other = clip.load(tmp_path)
    assert other.mean == (0, 0.5, 0.5) and other.std == (0.25, 0.5, 0.5)
    picture = jnp.full((1, 12, 12, 3), 128, np.uint8)
    away = np.abs(other.images(other.params, picture) - tiny.images(tiny.params, picture)).max()
    assert away > 1e-3


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"resample": 2}, "resample must be 3, got 2"),
        ({"size": {"shortest_edge": 224}}, "size must be image_size=12"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers, 0 to 10"),
        ({"image_std": [0, 1, 1]}, "image_std must be three numbers, 0.001 to 10"),
        ({"rescale_factor": 10**400}, "rescale_factor must be 0.0039"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be 0.0039"),
        ({"do_center_crop": False}, "do_center_crop must be true, got False"),
        ([], "must hold the fields of a CLIPImageProcessor"),
    ],
)
def test_pictures_that_are_treated_in_another_way_are_refused(fields, said, tmp_path):
    clip_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as e:
        clip.load(tmp_path)
    assert said in str(e.value)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"model_type": "siglip"}, "model_type must be 'clip', got 'siglip'"),
        ({"model_type": "clip", "text_config": {"hidden_size": 9}}, "multiple of num_attention"),
        ({"model_type": "clip", "vision_config": {"patch_size": 5}}, "multiple of patch_size=5"),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, "num_channels must be 3"),
        ({"model_type": "clip", "text_config": 7}, "config.json"),
    ],
)
def test_configs_of_other_models_are_refused(fields, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as e:
        clip.load(tmp_path)
    assert said in str(e.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Or the end of a text would not be found, and all texts would be one."""
    clip_folder(tmp_path, tokenizer=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="eos_token_id of config.json is 7, and that of the token"):
        clip.load(tmp_path)
    fields["text_config"]["eos_token_id"] = 2  # as older files have it: the largest id
    (tmp_path / "config.json").write_text(json.dumps(fields))
    one, other = clip.load(tmp_path).texts(["a red circle", "a blue circle"])
    assert np.abs(one - other).max() > 1e-3


def test_the_published_clip_is_named_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        clip.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no config\.json; give the folder of a CLIP"):
        clip.load(tmp_path)
