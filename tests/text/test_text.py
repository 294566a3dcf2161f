import dataclasses
import functools
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from PIL import Image

from cascade import cli, testing
from cascade.commands.train import STOPPED
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.scenes.captions import VOCABULARY, caption_at, mentions
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining, description
from cascade.storage.checkpoint import Checkpoints
from cascade.text import T5Encoder, Tokenizer, captions
from cascade.text.captions import prepared
from cascade.text.t5 import SHIPPED, read_folder, write_folder
from cascade.text.tokenizer import EOS_ID, PAD_ID
from cascade.training import text_job
from cascade.training.log import TrainingLog
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.step import begin
from cascade.training.text_job import SENTINELS, batches, padded, shares_right, span_corruption
from cascade.training.trainable import Only

FIXTURE = Path(__file__).parents[1] / "fixtures" / "t5"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer((FIXTURE / "spiece.model").read_bytes(), 64)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the fixture."""
    for name in ("config.json", "spiece.model", "model.safetensors"):
        (tmp_path / name).write_bytes((FIXTURE / name).read_bytes())
    return tmp_path


def test_ids_equal_the_reference_tokenizer(tokenizer):
    tokens = tokenizer(EXPECTED["texts"])
    found = [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)]
    assert found == EXPECTED["ids"]
    assert (tokens.ids[~tokens.mask] == PAD_ID).all()


@pytest.mark.parametrize("source", [FIXTURE, SHIPPED["scenes"]], ids=["fixture", "scenes"])
def test_ids_equal_transformers_live(source):
    import transformers

    theirs = transformers.T5Tokenizer.from_pretrained(source)
    ours = Tokenizer((source / "spiece.model").read_bytes(), 24)
    texts = ["", "a cat, two DOGS!", "A small Red circle above the blue square.", "red " * 50]
    for text in texts:
        expected = theirs(text, truncation=True, padding="max_length", max_length=24)
        tokens = ours([text])
        assert tokens.ids[0].tolist() == expected["input_ids"]
        assert tokens.mask[0].tolist() == [bool(m) for m in expected["attention_mask"]]


def test_truncation_keeps_the_end_of_sequence_and_is_reported():
    tokenizer = Tokenizer((FIXTURE / "spiece.model").read_bytes(), 9)
    eight, nine = (
        "a small red circle above a big square",
        "a small red circle above a big blue square",
    )
    tokens = tokenizer([eight, nine, ""])
    assert tokens.truncated.tolist() == [False, True, False]
    assert tokens.ids[0, -1] == tokens.ids[1, -1] == tokens.ids[2, 0] == EOS_ID
    assert tokens.ids[1, :8].tolist() == tokenizer.pieces(nine)[:8]
    assert tokens.mask.sum(1).tolist() == [9, 9, 1]


def test_a_tokenizer_pickles_for_data_workers(tokenizer):
    tokenizer([""])  # with its processor made
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy(["a star"]).ids, tokenizer(["a star"]).ids)


CLEANED = json.loads((FIXTURE.parent / "deepfloyd" / "captions.json").read_text())


def test_captions_are_cleaned_as_deepfloyd_if_cleans_them():
    assert [prepared(text, "clean") for text in CLEANED["texts"]] == CLEANED["clean"]


def test_captions_that_are_not_cleaned_are_lower_case_or_verbatim(monkeypatch):
    assert [prepared(text, "lower") for text in CLEANED["texts"]] == CLEANED["lower"]
    assert [prepared(text, "verbatim") for text in CLEANED["texts"]] == CLEANED["texts"]
    captions._can_clean.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"only lower-cased.*bs4 and ftfy; pip install"):
        assert prepared("  <b>A Cat</b> ", "clean") == "<b>a cat</b>"
    captions._can_clean.cache_clear()


def test_the_tokenizer_prepares_captions_and_pickles_with_its_rule():
    model = (FIXTURE / "spiece.model").read_bytes()
    plain, lower = Tokenizer(model, 77), pickle.loads(pickle.dumps(Tokenizer(model, 77, "lower")))
    assert (lower([" A Red STAR"]).ids == plain(["a red star"]).ids).all()
    assert (plain([" A Red STAR"]).ids != plain(["a red star"]).ids).any()
    assert lower([""]).ids.tolist() == [[EOS_ID] + [PAD_ID] * 76]


@pytest.mark.parametrize("given", ["", "text_encoder"])
def test_a_diffusers_pipeline_gives_its_text_encoder(tmp_path, given):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "text_encoder" / name).write_bytes((FIXTURE / name).read_bytes())
    spiece = tmp_path / "tokenizer" / "spiece.model"
    spiece.write_bytes((FIXTURE / "spiece.model").read_bytes())
    config, params, found = read_folder(tmp_path / given)
    expected = read_folder(FIXTURE)
    assert (config, found) == (expected[0], expected[2])
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    spiece.unlink()
    with pytest.raises(UserError, match=r"spiece.model is missing"):
        read_folder(tmp_path / given)


def test_tokenizing_needs_no_jax():
    code = "import sys, cascade.text.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_empty_prompt_is_a_token():
    assert T5Encoder.load(FIXTURE, max_tokens=5)([""]).mask.sum() == 1


def test_a_written_folder_reads_back(tmp_path):
    config, params, spiece = read_folder(FIXTURE)
    write_folder(tmp_path / "f32", config, params, spiece, dtype=np.float32)
    again = read_folder(tmp_path / "f32")
    assert again[0] == config and again[2] == spiece
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
    theirs = safetensors.numpy.load_file(FIXTURE / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "f32" / "model.safetensors")
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
    with pytest.raises(ValueError, match=r"shared.weight .* float16"):
        write_folder(tmp_path / "f16", config, params | {"shared": params["shared"] * 1e6}, spiece)


def test_shards_the_other_spelling_and_a_decoder_make_no_difference(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["decoder.final_layer_norm.weight"] = np.ones(3, np.float32)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, read_folder(folder)[1], read_folder(FIXTURE)[1])
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors, which .* lists, is missing"):
        read_folder(folder)


def test_every_missing_or_misshapen_tensor_is_named(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.k.weight"]
    tensors["encoder.final_layer_norm.weight"] = np.ones(7, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    tensors["encoder.block.3.layer.0.SelfAttention.k.weight"] = np.ones(7, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as e:
        T5Encoder.load(folder)
    assert "block.1.layer.0.SelfAttention.k.weight is missing" in str(e.value)
    assert "final_layer_norm.weight is [7], expected [16]" in str(e.value)
    assert "block.3.layer.0.SelfAttention.k.weight is left over" in str(e.value)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\.bin.*never read.*save_pretrained"):
        T5Encoder.load(folder)


@pytest.mark.parametrize("name", ["config.json", "spiece.model"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        T5Encoder.load(folder)


def test_damaged_files_are_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="damaged or cut short"):
        T5Encoder.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        T5Encoder.load(folder)
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(UserError, match="config.json: model_type must be 't5', got 'clip_text"):
        T5Encoder.load(folder)


def test_a_folder_or_hub_name_that_is_not_there_gets_advice(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder; give one that `cascade train`"):
        T5Encoder.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder; give one that `cascade train`"):
        T5Encoder.load("./nowhere")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no-one/no-t5.*give a local folder") as e:
        T5Encoder.load("no-one/no-t5")
    assert "\n" not in str(e.value)


def test_the_shipped_encoder_fits_every_caption_and_knows_its_words():
    encoder = T5Encoder.load("scenes")
    captions = [caption_at(0, i, "long")[1].text for i in range(500)]
    assert not encoder.tokenize(captions).truncated.any()
    assert encoder.max_tokens == 64
    pieces = encoder.tokenizer.pieces
    looks = [w for w in VOCABULARY if w not in ("containing", "there", "against")]
    assert [w for w in looks if len(pieces(w)) > 1] == []
    # Words that no caption has stay apart, in any script and letter case.
    assert pieces("日本") != pieces("東京") and pieces("RED Circle") == pieces("red circle")
    assert sum(f.stat().st_size for f in SHIPPED["scenes"].iterdir()) < 3e6


def test_the_shipped_encoder_tells_at_the_noun_which_colour_it_has():
    """A linear map from the embedding of "circle" to the circle's colour.

    Chance is 0.1, and a bag of words, which knows both colours but not whose they are, gets 0.55.
    """
    encoder = T5Encoder.load("scenes", max_tokens=12)
    rng = np.random.default_rng(0)
    colours = "red orange yellow lime green cyan blue purple pink brown".split()
    pairs = rng.integers(0, 10, (1200, 2))
    texts = [f"a {colours[a]} circle above a {colours[b]} square" for a, b in pairs]
    tokens = encoder.tokenize(texts)
    (circle,) = encoder.tokenizer.pieces("circle")
    x = np.asarray(encoder.embed(tokens).values)[tokens.ids == circle]
    fitted, seen = x[:900], np.eye(10)[pairs[:900, 0]]
    weights = np.linalg.solve(fitted.T @ fitted + np.eye(x.shape[1]), fitted.T @ seen)
    assert ((x[900:] @ weights).argmax(1) == pairs[900:, 0]).mean() > 0.97


@pytest.mark.parametrize("n", [2, 3, 7, 40])
@pytest.mark.parametrize("corrupted,mean_span", [(0.15, 3.0), (0.25, 1.5), (0.9, 1.0)])
def test_splicing_the_spans_back_undoes_the_corruption(n, corrupted, mean_span):
    ids, first = np.arange(10, 10 + n), 999
    for seed in range(20):
        source, target = span_corruption(
            ids,
            np.random.default_rng(seed),
            corrupted=corrupted,
            mean_span=mean_span,
            first_sentinel=first,
        )
        spans = {}
        for t in target.tolist():
            if t > 900:
                last = spans[t] = []
            else:
                last.append(t)
        rebuilt = [i for t in source.tolist() for i in spans.get(t, [t])]
        assert rebuilt == ids.tolist()
        sentinels = list(range(first, first - len(spans), -1))
        assert sentinels == list(spans) == [t for t in source if t > 900]
        assert all(spans.values())
        masked = len(target) - len(sentinels)
        assert masked == min(max(round(n * corrupted), 1), n - 1)


TINY = TextPretraining(
    encoder=T5Config(
        vocab_size=360 + SENTINELS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    ),
    images=40 * 16,
    batch_size=16,
    length=16,
    learning_rate=2e-2,
    warmup_images=5 * 16,
    vocabulary_captions=200,
    log_every_images=10 * 16,
    save_every_images=15 * 16,
    preview_every_images=20 * 16,
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    assert fit(TINY, folder)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def averaged(folder):
    checkpoints = Checkpoints(folder)
    _, params, _ = checkpoints.restore_ema()
    checkpoints.close()
    return params


def restored(folder, job=TINY):
    """All that the newest checkpoint holds of what training changes."""
    target = jax.eval_shape(lambda: begin(job, job.transformation(), job.fresh(jax.random.key(0))))
    checkpoints = Checkpoints(folder)
    step, train, ema, data = checkpoints.restore(**target)
    checkpoints.close()
    return {"step": step, "train": train, "ema": ema, "data": data}


def test_pretraining_learns_and_exports_a_text_encoder(pretrained):
    rows = rows_of(pretrained)
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert losses[-1] < 0.6 * losses[0]
    encoder = T5Encoder.load(pretrained / "text_encoder", max_tokens=8)
    assert np.isfinite(encoder(["a red circle"]).values).all()
    assert (pretrained / "loss.png").exists()


def test_the_linear_reading_learns_which_words_are_told(pretrained):
    """From which noun takes longer to learn: the next test has the encoder that ships."""
    words = averaged(pretrained)["words"]
    encoder = T5Encoder.load(pretrained / "text_encoder", max_tokens=16)
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    held_out = dataclasses.replace(TINY, seed=5)
    surprise = []
    for made in itertools.islice(batches(held_out, held_out.texts(), tokenizer, 0), 4):
        ids, told = jnp.asarray(made["inputs"]), made["targets"] != PAD_ID
        encoded = encoder.apply(encoder.params, ids, ids != PAD_ID).values
        mean = np.mean(encoded, axis=1, where=made["visible"][:, :, None])
        probability = jax.nn.log_softmax(mean @ words)
        surprise.append(-np.take_along_axis(probability, made["targets"], axis=-1)[told])
    assert np.concatenate(surprise).mean() < 0.7 * np.log(TINY.encoder.vocab_size)


def test_a_linear_map_reads_from_a_noun_of_the_shipped_encoder_where_its_thing_stands():
    places = ("left", "right", "above", "below")
    encoder = T5Encoder.load("scenes", max_tokens=32)
    said = [caption_at(3, i, min_objects=2, max_objects=2)[1] for i in range(900)]
    said = [c for c in said if c.facts.relations and "." not in c.text and len(c.facts.things) == 2]
    values = np.asarray(encoder([c.text for c in said]).values)
    nouns, place = [], []
    for row, one in zip(values, said, strict=True):
        for start, told in mentions(one):
            if told.split()[0] in places:
                nouns.append(row[len(encoder.tokenizer.pieces(one.text[:start].rstrip()))])
                place.append(places.index(told.split()[0]))
    x, y = np.c_[nouns, np.ones(len(nouns))], np.eye(4)[place]
    fitted = np.arange(len(x)) < 0.7 * len(x)
    weights = np.linalg.lstsq(x[fitted], y[fitted])[0]
    right = np.argmax(x @ weights, axis=-1) == place
    assert len(x) > 400 and right[~fitted].mean() > 0.95


CONFIG = """
from cascade.devices.sharding import MeshConfig
from cascade.models.t5 import T5Config
from cascade.scenes.text_pretraining import TextPretraining
from cascade.training.trainable import Weights

def config():
    return {!r}
"""


def test_a_resumed_run_equals_an_uninterrupted_one(pretrained, tmp_path, capsys):
    """Also when the line of a killed run is left in its figures."""
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(TINY))
    cli.main(["train", str(file), "--workdir", str(tmp_path), "--until", "260"])
    assert not (tmp_path / "text_encoder").exists()
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(row)["step"] for row in rows.splitlines()] == [10, 17]  # 17 of 16 examples
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 20, "lo')
    cli.main(["train", str(file), "--workdir", str(tmp_path)])
    saved, expected = (restored(folder) for folder in (tmp_path, pretrained))
    jax.tree.map(np.testing.assert_array_equal, saved, expected)
    # Rows are means since the row before, which the first after the interruption lacks.
    figures = [[(r["images"], r["loss"]) for r in rows_of(d)[-2:]] for d in (tmp_path, pretrained)]
    assert figures[0] == figures[1]
    made = [(d / "text_encoder/model.safetensors").read_bytes() for d in (tmp_path, pretrained)]
    assert made[0] == made[1]
    with pytest.raises(SystemExit):
        cli.main(["train", str(file), "--workdir", str(tmp_path), "--until", "banana"])
    assert "--until must be a number of images, 1 or more, got banana" in capsys.readouterr().err


@pytest.fixture
def begun(pretrained, tmp_path):
    """A folder that has the vocabulary of a run, and nothing else."""
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(pretrained / "spiece.model", folder)
    return folder


def test_eight_devices_make_the_losses_of_one(pretrained, begun, monkeypatch):
    assert len(jax.devices()) == 8
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    fit(TINY, begun, until=20 * 16)
    losses = [[row["loss"] for row in rows_of(d)[:2]] for d in (pretrained, begun)]
    assert np.allclose(*losses, rtol=1e-4) and losses[0][0] > 1.05 * losses[0][1]


def test_parts_of_a_batch_have_its_loss_though_not_its_tokens(pretrained):
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    params, key = jax.tree.map(jnp.asarray, averaged(pretrained)), jax.random.key(0)
    mixed = [TINY.texts().example(tokenizer, i) for i in range(16)]
    for i, one in enumerate(mixed):
        mixed[i] = dataclasses.replace(one, target=one.target[: 2 + i % 4])
    batch = padded(mixed)
    rows = [{k: v[i::4] for k, v in batch.items()} for i in range(4)]
    whole = jax.jit(TINY.loss)(params, batch, key)
    loss = jax.jit(lambda rows, i: TINY.loss(params, rows, key, (i, 4)))
    parts = [loss(part, i) for i, part in enumerate(rows)]
    mean = jax.tree.map(lambda *x: np.mean(x), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mean, whole)
    counts = [int((part["targets"] != PAD_ID).sum()) for part in rows]
    assert len(set(counts)) > 1 and sum(counts) == batch["told"][0]


def test_the_text_encoder_that_is_written_is_the_average(begun):
    job = dataclasses.replace(TINY, images=96, warmup_images=32, ema_decay=0.9)
    assert fit(dataclasses.replace(job, preview_every_images=0), begun)
    state = restored(begun, job)
    written = read_folder(begun / "text_encoder")[1]
    half = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float16))
    jax.tree.map(np.testing.assert_array_equal, half(written), half(state["ema"]["encoder"]))
    weights = half(state["train"]["params"]["encoder"])
    apart = jax.tree.map(lambda a, b: (a != b).mean(), weights, half(written))
    assert np.mean(jax.tree.leaves(apart)) > 0.8


def test_updates_that_are_not_finite_stop_it_with_the_usual_message(begun):
    changes = {"learning_rate": 1e30, "warmup_images": 0, "skip_limit": 3, "log_every_images": 16}
    wild = dataclasses.replace(TINY, preview_every_images=0, **changes)
    with pytest.raises(UserError, match="training diverged: the last 3 updates, up to image"):
        fit(wild, begun)
    assert [row["skipped"] for row in rows_of(begun)][-3:] == [1, 1, 1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(averaged(begun)))
    assert not (begun / "text_encoder").exists()


def test_a_terminated_run_saves_and_exits_as_one_that_was_stopped(begun, monkeypatch, capsys):
    (begun / "config.py").write_text(CONFIG.format(TINY))
    add = TrainingLog.add

    def terminated(self, *given):
        add(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingLog, "add", terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as e:
            cli.main(["train", str(begun / "config.py"), "--workdir", str(begun)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert e.value.code == STOPPED == 143
    assert f"stopped: {begun}; the same command goes on" in capsys.readouterr().err
    assert restored(begun)["step"] == 1 and not (begun / "text_encoder").exists()


def test_its_previews_are_pictures_of_the_shares_right(pretrained, monkeypatch):
    names = [f"{images:010d}.png" for images in (320, 640)]
    assert sorted(p.name for p in (pretrained / "previews").iterdir()) == names
    with Image.open(pretrained / "previews" / names[0]) as drawn:
        assert drawn.format == "PNG" and np.asarray(drawn).std() > 10
    tokenizer, wrong = Tokenizer((pretrained / "spiece.model").read_bytes(), 64), "retelling"

    def perfect_but_in_one(config, params, batch):
        """Of corrupted texts, whose targets begin with a sentinel, it says all, else half."""
        targets, at = batch["targets"], jnp.arange(batch["targets"].shape[1])
        corrupted = targets[:, :1] >= config.vocab_size - SENTINELS
        said = jnp.where(corrupted | (at % 2 == 0), targets, targets + 1)
        return None, jax.nn.one_hot(said, config.vocab_size)

    monkeypatch.setattr(text_job, "logits", perfect_but_in_one)
    shares = shares_right(TINY, TINY.texts(), tokenizer, {})
    assert list(shares) == ["description", wrong, "span corruption"]
    assert shares["span corruption"] == 1 and 0.5 <= shares[wrong] < 0.6
    without = dataclasses.replace(TINY, retold=0.0)
    assert wrong not in shares_right(without, without.texts(), tokenizer, {})


def test_what_a_run_cannot_change_is_refused_by_name(pretrained):
    encoder = dataclasses.replace(TINY.encoder, d_ff=8)
    for changes, told in (
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"images": 80 * 16}, "images: 640 before, 1280 now"),
        ({"batch_size": 32}, "batch_size: 16 before, 32 now"),
        ({"encoder": encoder}, "encoder.d_ff: 16 before, 8 now"),
        ({"described": 0.1}, "described: 0.5 before, 0.1 now"),
        ({"learning_rate": 1.0}, "learning_rate: 0.02 before, 1.0 now"),
        ({"trainable": Only(pattern="encoder/")}, "trainable.pattern: None before, encoder/ now"),
    ):
        with pytest.raises(UserError) as e:
            fit(dataclasses.replace(TINY, **changes), pretrained)
        assert f"holds a run with another config ({told}); use its config" in str(e.value)
    assert fit(dataclasses.replace(TINY, log_every_images=16, keep=1), pretrained)


def test_a_stage_is_refused_where_a_text_encoders_run_is(pretrained):
    files = {p: p.read_bytes() for p in pretrained.rglob("*") if p.is_file()}
    stage = StageTraining(stage=testing.smallest_stage(), data=ScenesData(), images=8, batch_size=8)
    told = r"another kind \(TextPretraining, this is a StageTraining\); name another --workdir"
    with pytest.raises(UserError, match=told):
        fit(stage, pretrained)
    assert {p: p.read_bytes() for p in pretrained.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    "name,least",
    [
        *((name, 1) for name in ("images", "batch_size", "length", "vocabulary_captions")),
        *((name, 1) for name in ("log_every_images", "save_every_images")),
        *((name, 0) for name in ("seed", "warmup_images")),
    ],
)
def test_pretraining_that_cannot_be_is_refused(name, least):
    message = rf"TextPretraining\.{name} must be at least {least}, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{name: least - 1})


def test_hidden_outputs_are_a_share_and_never_all(pretrained):
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    config = dataclasses.replace(TINY, hidden=0.5, described=0.0)
    made = list(itertools.islice(batches(config, config.texts(), tokenizer, 0), 8))
    given = sum((b["inputs"] != PAD_ID).sum() for b in made)
    assert all((b["visible"] <= (b["inputs"] != PAD_ID)).all() for b in made)
    assert all(b["visible"].any(1).all() for b in made)
    assert sum(b["visible"].sum() for b in made) / given == pytest.approx(0.75, abs=0.05)


def test_a_description_is_told_from_its_noun_alone(pretrained):
    model = (pretrained / "spiece.model").read_bytes()
    tokenizer, pieces = (
        Tokenizer(model, 96),
        sentencepiece.SentencePieceProcessor(model_proto=model),
    )
    config = dataclasses.replace(TINY, length=96)
    for index in range(60):
        said = caption_at(0, index)[1]
        made = description(config, tokenizer, said, np.random.default_rng(index))
        (at,) = np.flatnonzero(made.visible)
        before = pieces.decode(made.source[:at].tolist())
        *_, noun = pieces.decode(made.target.tolist()).split(" on ")[0].split()
        assert said.text[len(before) :].strip().startswith(noun)


def test_batches_are_a_pure_function_of_the_step(pretrained):
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    whole = list(
        itertools.islice(batches(TINY, TINY.texts(), tokenizer, 30), 5)
    )  # across a border of groups
    one = next(batches(TINY, TINY.texts(), tokenizer, 33))
    assert len(whole) == 5
    for name, value in one.items():
        np.testing.assert_array_equal(value, whole[3][name])
