import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from cascade import cli
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.scenes.captions import VOCABULARY, caption_at, mentions
from cascade.scenes.text_pretraining import (
    SENTINELS,
    TextPretraining,
    batches,
    description,
    pretrain,
    span_corruption,
)
from cascade.text import T5Encoder, Tokenizer, captions
from cascade.text.captions import prepared
from cascade.text.t5 import SHIPPED, read_folder, write_folder
from cascade.text.tokenizer import EOS_ID, PAD_ID

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


def test_whitespace_is_normalised(tokenizer):
    plain = tokenizer(["two red stars"]).ids
    np.testing.assert_array_equal(tokenizer(["\t two\n\n red  stars "]).ids, plain)
    assert (tokenizer(["two redstars"]).ids != plain).any()


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


def test_null_embeddings_are_zero_and_unmasked_nowhere():
    encoder = T5Encoder.load(FIXTURE, max_tokens=5)
    null = encoder.null(3)
    assert null.values.shape == (3, 5, encoder.width) and null.mask.shape == (3, 5)
    assert not null.values.any() and not null.mask.any()
    assert encoder([""]).mask.sum() == 1  # the empty prompt is another thing


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
    assert "final_layer_norm.weight is [7], config.json asks for [16]" in str(e.value)
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
    with pytest.raises(UserError, match="no such folder"):
        T5Encoder.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
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
    examples=40 * 16,
    batch_size=16,
    length=16,
    learning_rate=2e-2,
    warmup_steps=5,
    vocabulary_captions=200,
    log_every_steps=10,
    save_every_steps=15,
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(TINY, folder)
    return folder


def test_pretraining_learns_and_exports_a_text_encoder(pretrained):
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert losses[-1] < 0.6 * losses[0]
    encoder = T5Encoder.load(pretrained / "text_encoder", max_tokens=8)
    assert np.isfinite(encoder(["a red circle"]).values).all()
    assert (pretrained / "loss.png").exists()


def test_the_linear_reading_learns_which_words_are_told(pretrained):
    """From which noun takes longer to learn: the next test has the encoder that ships."""
    state = safetensors.numpy.load_file(pretrained / "state.safetensors")
    words = state["['params']['words']"]
    encoder = T5Encoder.load(pretrained / "text_encoder", max_tokens=16)
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    held_out = dataclasses.replace(TINY, seed=5)
    surprise = []
    for made in batches(held_out, tokenizer, 0, 4):
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
from cascade.models.t5 import T5Config
from cascade.scenes.text_pretraining import TextPretraining

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
    pretrain(TINY, tmp_path)
    saved, expected = (
        safetensors.numpy.load_file(d / "state.safetensors") for d in (tmp_path, pretrained)
    )
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    with pytest.raises(UserError, match=r"another config \(seed\)"):
        pretrain(dataclasses.replace(TINY, seed=1), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["train", str(file), "--workdir", str(tmp_path), "--until", "banana"])
    assert "--until must be a number of images, got banana" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,least",
    [
        *((name, 1) for name in ("examples", "batch_size", "length", "vocabulary_captions")),
        *((name, 1) for name in ("log_every_steps", "save_every_steps")),
        *((name, 0) for name in ("seed", "warmup_steps")),
    ],
)
def test_pretraining_that_cannot_be_is_refused(name, least):
    message = rf"TextPretraining\.{name} must be at least {least}, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{name: least - 1})


def test_hidden_outputs_are_a_share_and_never_all(pretrained):
    tokenizer = Tokenizer((pretrained / "spiece.model").read_bytes(), 64)
    config = dataclasses.replace(TINY, hidden=0.5, described=0.0)
    made = list(batches(config, tokenizer, 0, 8))
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
    whole = list(batches(TINY, tokenizer, 30, 35))  # across a border of groups
    (one,) = batches(TINY, tokenizer, 33, 34)
    assert len(whole) == 5
    for name, value in one.items():
        np.testing.assert_array_equal(value, whole[3][name])
