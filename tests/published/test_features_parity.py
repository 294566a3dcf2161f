"""Features and figures against torch-fidelity, pytorch-fid, torchmetrics and transformers, live.

Skipped without the extra [parity].
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures.feature_networks import clip_folder

from cascade.evaluation import clip_score, distances
from cascade.models import InceptionConfig, Network
from cascade.published import clip, inception

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch_fidelity")
reference = importlib.import_module("fixtures.make_features")


@pytest.fixture(scope="module")
def theirs():
    return reference.torch_fidelitys()


@pytest.mark.parametrize("size", [(299, 299), (256, 256), (64, 64), (500, 333)])
def test_inception_has_torch_fidelitys_features_of_pictures_of_any_size(size, theirs, tmp_path):
    call, tensors = theirs
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    x = np.random.default_rng(1).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    params = inception.read(tmp_path / "w.safetensors")
    found = jax.jit(Network(InceptionConfig()).__call__)(params, jnp.asarray(x))
    expected = call(x)
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("size", [(299, 299), (64, 64), (500, 333)])
def test_inception_has_pytorch_fids_features(size, theirs, tmp_path):
    pytest.importorskip("pytorch_fid")
    safetensors.numpy.save_file(theirs[1], tmp_path / "w.safetensors")
    x = np.random.default_rng(1).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    network = Network(InceptionConfig(like="pytorch-fid"))
    found = jax.jit(network.__call__)(inception.read(tmp_path / "w.safetensors"), jnp.asarray(x))
    expected = reference.pytorch_fids(theirs[1])(x)
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def two_sets(n=300, d=48):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((d, d)).astype(np.float32) / d**0.5
    x = np.abs(rng.standard_normal((n, d)).astype(np.float32) @ mix)
    y = np.abs(rng.standard_normal((n + 40, d)).astype(np.float32) @ mix + 0.2)
    return x, y


def test_the_frechet_distance_is_torch_fidelitys_and_pytorch_fids():
    from torch_fidelity import metric_fid

    x, y = two_sets()
    ours = distances.frechet(distances.statistics([x]), distances.statistics([y]))
    doubles = [z.astype(np.float64) for z in (x, y)]
    stats = [metric_fid.fid_features_to_statistics(torch.tensor(z)) for z in doubles]
    found = metric_fid.fid_statistics_to_metric(*stats, False)[metric_fid.KEY_METRIC_FID]
    assert ours == pytest.approx(found, rel=1e-6)
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    means = [(z.mean(0), np.cov(z, rowvar=False)) for z in doubles]
    assert ours == pytest.approx(
        fid_score.calculate_frechet_distance(*means[0], *means[1]), rel=1e-5
    )


def test_the_kernel_distance_of_the_same_pictures_is_torch_fidelitys():
    """Each has its own way of drawing subsets, so the subset is the whole set."""
    from torch_fidelity import metric_kid

    x, y = two_sets()
    y = y[: len(x)]
    found = metric_kid.kid_features_to_metric(
        *(torch.tensor(x), torch.tensor(y)),
        **{"kid_subsets": 2, "kid_subset_size": len(x), "verbose": False},
    )
    ours = distances.kernel(x.__getitem__, y.__getitem__, (300, 300), subsets=2, size=300)
    assert ours["mean"] == pytest.approx(found[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity import metric_prc

    x, y = two_sets()
    found = metric_prc.prc_features_to_metric(torch.tensor(x), torch.tensor(y), verbose=False)
    ours = distances.neighbourhoods(x, y)
    assert ours["precision"] == pytest.approx(found[metric_prc.KEY_METRIC_PRECISION], abs=1e-6)
    assert ours["recall"] == pytest.approx(found[metric_prc.KEY_METRIC_RECALL], abs=1e-6)


def test_density_and_coverage_are_prdcs():
    prdc = pytest.importorskip("prdc")
    x, y = two_sets()
    found = prdc.compute_prdc(real_features=y, fake_features=x, nearest_k=5)
    ours = distances.neighbourhoods(x, y)
    assert ours["density"] == pytest.approx(found["density"], abs=1e-5)
    assert ours["coverage"] == pytest.approx(found["coverage"], abs=1e-5)


@pytest.mark.parametrize("name", ["tiny", "openai/clip-vit-base-patch32"])
def test_clip_has_transformers_embeddings_as_it_writes_them(name, tmp_path):
    """With random weights of the published shapes; the larger ones differ in numbers alone."""
    tiny = (reference.TINY["text"], reference.TINY["vision"], 8, "gelu")
    config = reference.clip_config(*(tiny if name == "tiny" else reference.PUBLISHED[name]))
    model = reference.random_clip(config)
    inputs = reference.clip_inputs(config.text_config, config.vision_config)
    expected = reference.clip_outputs(model, *inputs)
    model.save_pretrained(tmp_path)
    network = clip.published(tmp_path)
    params = network.read("float32")
    bound = Network(network.config).bind
    ids, pixels = (jnp.asarray(a) for a in (inputs[0].astype(np.int32), inputs[1]))
    text = jax.jit(lambda p, x: bind_text(bound, p, x))(params, ids)
    image = jax.jit(lambda p, x: bound(p).image(x))(params, pixels.transpose(0, 2, 3, 1))
    for ours, theirs_ in zip((text, image), expected, strict=True):
        assert np.abs(ours - theirs_).max() < 1e-4 * theirs_.std()


def bind_text(bound, params, ids):
    return bound(params).text(ids)


def test_pictures_and_texts_are_prepared_as_by_transformers(tmp_path):
    folder = clip_folder(tmp_path, tokenizer=True)
    model = clip.load(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12)
    picture = np.random.default_rng(0).integers(0, 256, (40, 65, 3), dtype=np.uint8)
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (model.prepare(picture) / 255 - np.array(model.mean)) / np.array(model.std)
    assert np.abs(ours - expected).max() < 0.03
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = ["a red circle", "a " * 40]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    from cascade.text import clip as text_clip

    np.testing.assert_array_equal(text_clip.tokenize(model.tokenizer, texts, 12).ids, ids)


def test_the_clip_score_is_torchmetrics(tmp_path):
    """Picture by picture, from the pixels and the words on, with transformers' tiny CLIP."""
    metrics = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    folder = clip_folder(tmp_path, tokenizer=True)
    model = clip.load(folder)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    for name in ("get_image_features", "get_text_features"):
        # transformers 5 has a record where torchmetrics 1.9 expects the embeddings in it.
        given = getattr(theirs, name)
        setattr(theirs, name, lambda *a, given=given, **k: given(*a, **k).pooler_output)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12),
        transformers.CLIPTokenizer.from_pretrained(folder),
    )
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    words = ["a red circle", "a blue circle", "red", "10 circle", "above", "a b c"]
    embedded = np.asarray(model.images(model.params, jnp.asarray(pictures)))
    found = clip_score.scores(embedded, model.texts(words), np.arange(6))
    for picture, text, cosine in zip(pictures, words, found.cosines, strict=True):
        expected = metrics.clip_score(
            torch.tensor(picture.transpose(2, 0, 1)), text, lambda: (theirs, processor)
        )
        assert max(100 * cosine, 0) == pytest.approx(float(expected), abs=5e-3)
    assert found.as_json()["clip_score"] == pytest.approx(
        np.maximum(100 * found.cosines, 0).mean(), abs=1e-3
    )
