"""Training a CLIP on captioned pictures."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from cascade.data import FolderData
from cascade.devices import sharding
from cascade.devices.sharding import MeshConfig
from cascade.models import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from cascade.published import clip as published
from cascade.scenes.dataset import ScenesData
from cascade.text import clip as text_clip
from cascade.training.clip_training import CLIPTraining, loss, retrieved, same
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.step import begin, make_train_step

SMALL = CLIPConfig(
    text=CLIPTextConfig(
        **{"vocab_size": 530, "hidden_size": 16, "intermediate_size": 16, "eos_token_id": 2},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16},
    ),
    vision=CLIPVisionConfig(
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    ),
    projection_dim=8,
)


def job(**changes):
    given = {
        **{"clip": SMALL, "data": ScenesData(), "images": 32, "batch_size": 16},
        **{"optimizer": Optimizer(learning_rate=3e-3), "validation": 0.0, "ema_decay": 0.9},
        **{"preview_every_images": 0, "log_every_images": 16, "vocabulary_captions": 50},
    }
    return CLIPTraining(**(given | changes))


def slow_loss(logits, captions):
    """The mean over pictures, and over texts, of the mean surprise at what belongs to each."""
    total = 0.0
    for matrix in (logits, logits.T):
        for row, own in zip(matrix, captions, strict=True):
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            belonging = [i for i, other in enumerate(captions) if other == own]
            total += -np.mean(np.log(p[belonging])) / (2 * len(logits))
    return total


def test_the_loss_is_the_surprise_at_what_belongs_together():
    logits = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    tokens = jnp.asarray([[1, 2], [3, 4], [1, 2], [5, 6]])
    belongs = same(tokens)
    assert np.allclose(belongs.sum(axis=1), 1) and belongs[0, 2] == 0.5 and belongs[1, 1] == 1
    found = loss(jnp.asarray(logits), belongs)
    assert found == pytest.approx(slow_loss(logits, ["a", "b", "a", "c"]), rel=1e-5)
    alone = loss(jnp.asarray(logits), jnp.eye(4))
    expected = optax.softmax_cross_entropy_with_integer_labels
    rows, columns = (expected(jnp.asarray(x), jnp.arange(4)).mean() for x in (logits, logits.T))
    assert alone == pytest.approx(float((rows + columns) / 2), rel=1e-5)


@pytest.fixture(scope="module")
def stepped():
    """(weights, metrics) after one step of SGD at rate 1 on one device and on eight."""
    config = job()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
        "tokens": rng.integers(0, 530, (16, 16)).astype(np.int32),
    }
    params, optimizer = config.fresh(jax.random.key(0)), optax.sgd(1.0)
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        state = begin(config, optimizer, params)
        placement = sharding.shardings(state, mesh)
        step = jax.jit(
            make_train_step(config, optimizer, mesh),
            in_shardings=(placement, sharding.batch_sharding(mesh)),
            out_shardings=(placement, sharding.replicated(mesh)),
        )
        after, metrics = step(jax.device_put(state, placement), sharding.shard_batch(batch, mesh))
        found.append((jax.tree.map(np.asarray, after["train"]["params"]), metrics))
    return config, params, batch, found


def test_eight_devices_have_the_loss_and_gradients_of_one(stepped):
    """The loss is over the whole batch, and not over what each device has of it."""
    config, params, batch, ((one, alone), (many, together)) = stepped
    assert together["loss"] == pytest.approx(float(alone["loss"]), rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), many, one)
    halves = [
        config.loss(params, {k: jnp.asarray(v[i : i + 8]) for k, v in batch.items()}, None)[0]
        for i in (0, 8)
    ]
    assert abs(float(np.mean(halves)) - float(alone["loss"])) > 0.1


def test_the_temperature_is_learned_and_bounded(stepped):
    config, params, batch, _ = stepped
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    gradient = jax.jit(jax.grad(lambda p: config.loss(p, batch, None)[0]))
    assert abs(gradient(params)["logit_scale"]) > 1e-4
    cold = {**params, "logit_scale": jnp.float32(9.0)}
    assert config.loss(cold, batch, None)[1]["temperature"] == pytest.approx(0.01)
    assert gradient(cold)["logit_scale"] == 0


COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "white": (240,) * 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned four colours."""
    folder = tmp_path_factory.mktemp("colours")
    for i in range(80):
        name = list(COLOURS)[i % 4]
        noise = np.random.default_rng(i).integers(-20, 20, (8, 8, 3))
        picture = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {name} thing")
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = job(
        **{"data": FolderData(path=str(folder)), "images": 640, "validation": 0.2},
        **{"validate_every_images": 320, "preview_every_images": 640, "log_every_images": 320},
    )
    assert fit(config, workdir)
    return workdir, config


def test_it_learns_what_belongs_together_and_tells_of_held_out_pictures(run):
    workdir, _ = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation/caption_found"] == rows[-1]["validation/picture_found"] == 1
    assert list((workdir / "previews").glob("*.png"))


def test_what_it_ends_in_is_a_clip_that_opens_by_the_same_door(run):
    model = published.load(run[0] / "clip")
    pictures = np.stack([np.full((8, 8, 3), rgb, np.uint8) for rgb in COLOURS.values()])
    texts = [f"a {name} thing" for name in COLOURS]
    near = np.array([model.likeness(pictures, [text] * 4) for text in texts])
    np.testing.assert_array_equal(near.argmax(axis=1), range(4))
    assert model.config.text.eos_token_id == model.tokenizer.eos_token_id


def test_a_run_goes_on_with_its_own_tokenizer(run):
    workdir, config = run
    vocabulary = (workdir / "tokenizer" / "vocab.json").read_bytes()
    longer = dataclasses.replace(config, images=656)
    assert (
        fit(longer, workdir) and (workdir / "tokenizer" / "vocab.json").read_bytes() == vocabulary
    )


def test_a_tokenizer_is_learned_of_the_texts_and_spells_any_other(tmp_path):
    texts = ["a red circle above a blue circle", "a red star", "two blue circles"] * 5
    size = text_clip.write_tokenizer(tmp_path, texts, 40)
    assert 514 < size <= 554
    tokenizer = text_clip.read_tokenizer(tmp_path, size)
    ids = text_clip.tokenize(tokenizer, ["a red circle", "zebra, ünïcode"], 40).ids
    assert (ids.max(), tokenizer.eos_token_id) == (size - 1, size - 1)
    lengths = (ids != size - 1).sum(axis=1)
    assert lengths[0] == 4 and lengths[1] > 10  # its beginning and three words; letters
    back = [tokenizer.decode(row[row < size - 2]).strip() for row in ids]
    assert back == ["a red circle", "zebra , ünïcode"]
    other = text_clip.write_tokenizer(tmp_path / "again", texts, 40)
    assert other == size
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_retrieval_counts_what_is_nearest():
    x = np.eye(4, dtype=np.float32)
    assert retrieved(x, x) == (1.0, 1.0)
    assert retrieved(x, x[[1, 0, 2, 3]]) == (0.5, 0.5)
    texts = np.array([[1, 0], [0.9, 0.1]], np.float32)
    assert retrieved(np.array([[1, 0], [1, 0]], np.float32), texts) == (0.5, 0.5)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"microbatches": 2}, "microbatches must be 1, since a picture is compared"),
        ({"validation": 1.0}, r"validation must lie in \[0, 1\)"),
        ({"vocabulary_captions": 0}, "vocabulary_captions must be at least 1"),
        (
            {"clip": dataclasses.replace(SMALL, text=CLIPTextConfig(eos_token_id=7))},
            "vocab_size must be 515 or more and eos_token_id 2, got 49408 and 7",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        job(**changes)
