"""A text encoder of the captions of any dataset, and a stage that is told by it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from written import pairs, records

from cascade import Cascade, cli, images, testing
from cascade.commands.export import export
from cascade.commands.train import read_job
from cascade.config import from_json, to_json
from cascade.data import FolderData, Mixture, TableData
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.text import T5Encoder, Tokenizer
from cascade.text.vocabulary import train_vocabulary, with_words
from cascade.training.job import Job, Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.text_job import SENTINELS, batches
from cascade.training.text_training import TextTraining

pytestmark = pytest.mark.usefixtures("one_device")
CONFIG = "configs/text_encoder_own.py"
WORDS = ("schwarzer", "roter", "gelber", "weißer")
COLOURS = ((0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255))


def job_of(data, **changes):
    encoder = T5Config(
        vocab_size=360 + SENTINELS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    job = TextTraining(
        data=data,
        encoder=encoder,
        images=40 * 16,
        batch_size=16,
        length=16,
        learning_rate=2e-2,
        warmup_images=5 * 16,
        log_every_images=10 * 16,
        save_every_images=15 * 16,
        preview_every_images=40 * 16,
    )
    return dataclasses.replace(job, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures, each of one of four colours, with captions in no word of scenes; one without
    a caption."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), COLOURS[i % 4]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Ein {WORDS[i % 4]} Karton, Nummer {i}")
    Image.new("RGB", (8, 8)).save(folder / "none.png")
    return folder


@pytest.fixture(scope="module")
def made(folder):
    run = folder.parent / "words"
    assert fit(job_of(FolderData(path=str(folder))), run)
    return run


def test_it_learns_and_writes_an_encoder_whose_pieces_are_the_captions_words(made):
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    encoder = T5Encoder.load(made / "text_encoder", 12)
    pieces = [encoder.tokenizer.pieces(text) for text in ("karton", "Weißer", "nummer")]
    assert [len(p) for p in pieces] == [1, 1, 1]
    assert len(encoder.tokenizer.pieces("zebra")) > 1
    values = np.asarray(encoder([f"ein {word} karton" for word in WORDS]).values)
    assert np.isfinite(values).all()
    assert len({row.tobytes() for row in values}) == 4
    with Image.open(made / "previews" / "0000000640.png") as drawn:
        assert drawn.format == "PNG"
        levels = np.asarray(drawn.convert("L"))
    for edge in (levels[:3], levels[-3:], levels[:, :3], levels[:, -3:]):
        assert (edge == 255).all()  # where words run out of it, there is ink


def test_a_picture_without_a_caption_is_listed_by_the_run(made):
    listed = [json.loads(line) for line in (made / "skipped.jsonl").read_text().splitlines()]
    assert [(one["key"], one["reason"]) for one in listed] == [("none.png", "without a caption")]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, made, tmp_path):
    job = job_of(FolderData(path=str(folder)))
    assert fit(job, tmp_path, until=260)
    assert not (tmp_path / "text_encoder").exists()
    assert fit(job, tmp_path)
    name = "text_encoder/model.safetensors"
    assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_the_data_may_lie_elsewhere_when_the_run_goes_on_and_nothing_else(folder, made):
    """What is fixed is what decides the numbers that come."""
    link = folder.parent / "moved"
    link.symlink_to(folder)
    assert fit(job_of(FolderData(path=str(link))), made)
    other = pairs(folder.parent / "other", records(3))
    known = (made / "spiece.model").read_bytes()
    assert fit(job_of(other), made)  # with the vocabulary that its weights are of
    assert (made / "spiece.model").read_bytes() == known
    assert (made / "text_encoder" / "spiece.model").read_bytes() == known
    with pytest.raises(UserError, match="retold: 0.4 before, 0.9 now"):
        fit(job_of(FolderData(path=str(folder)), retold=0.9), made)


def test_a_stage_is_trained_and_drawn_with_that_encoder(folder, made, tmp_path):
    """What the caption says reaches the picture, by the encoder that was made of the captions."""
    job = StageTraining(
        stage=testing.smallest_stage(16),
        data=FolderData(path=str(folder)),
        text_encoder=str(made / "text_encoder"),
        text_tokens=16,
        images=40 * 8,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-2),
        ema_decay=0.9,
        preview_every_images=0,
        log_every_images=8 * 10,
    )
    assert fit(job, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    export([tmp_path / "run"], tmp_path / "model")
    own, encoder = Cascade.load(tmp_path / "model"), T5Encoder.load(made / "text_encoder", 16)
    np.testing.assert_array_equal(own.encoder(["karton"]).values, encoder(["karton"]).values)
    said = [f"ein {word} karton" for word in ("roter", "roter", "gelber")]
    one, same, other = (own(text, seed=0)[0].images[8] for text in said)
    assert (one == same).all() and (one != other).any()


def test_several_captions_of_a_picture_tell_each_other(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    told = ["one two three", "four five six"]
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": "a.png", "caption": told}))
    texts = job_of(TableData(path=str(tmp_path)), retold=1.0).texts()
    tokenizer = Tokenizer(train_vocabulary(texts.vocabulary(), 360), 64)
    ids = [tuple(tokenizer.pieces(text)) for text in told]
    seen = set()
    for index in range(40):
        one = texts.example(tokenizer, index)
        seen.add((ids.index(tuple(one.source)), ids.index(tuple(one.target))))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_captions_are_no_more_than_asked_for_and_no_two_alike(tmp_path):
    told = [["one two", "one two"], ["three", "four", "three"], *([f"word{i}"] for i in range(9))]
    lines = []
    for i, captions in enumerate(told):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": captions}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    data, rng = TableData(path=str(tmp_path)), np.random.default_rng(0)
    texts = job_of(data).texts()
    drawn = [texts.captions(i, rng, 2, False) for i in range(len(told))]
    assert sorted(map(sorted, drawn))[:2] == [["four", "three"], ["one two"]]
    assert all(len(texts.captions(i, rng, 1, False)) == 1 for i in range(len(told)))
    other = job_of(data, seed=1).texts()
    assert [list(other.captions(i, rng, 2, False)) for i in range(len(told))] != drawn
    few = list(job_of(data, vocabulary_captions=3).texts().vocabulary())
    whole = [text for text in few if "," not in text]
    assert len(whole) in (3, 4) and len(whole) == sum(len(drawn[i]) for i in range(3))


def test_what_is_longer_than_the_length_is_cut(folder, made):
    """To that many tokens with the end of sequence, on both sides."""
    texts = job_of(FolderData(path=str(folder)), length=4).texts()
    tokenizer = Tokenizer((made / "spiece.model").read_bytes(), 64)
    drawn = [texts.example(tokenizer, i) for i in range(20)]
    assert {max(len(e.source), len(e.target)) for e in drawn} == {3}
    assert {len(e.visible) - len(e.source) for e in drawn} == {1}


def test_a_mixture_gives_captions_in_its_proportions(folder, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "a.png")
    (tmp_path / "few" / "a.txt").write_text("rare")
    sources = FolderData(path=str(folder)), FolderData(path=str(tmp_path / "few"))
    texts = job_of(Mixture(sources=sources, weights=(1.0, 3.0))).texts()
    rng = np.random.default_rng(0)
    drawn = [texts.captions(index, rng, 1, False)[0] for index in range(400)]
    assert drawn.count("rare") == pytest.approx(300, abs=5)


def test_a_caption_that_is_gone_is_noted_and_another_one_read(folder):
    texts = job_of(FolderData(path=str(folder))).texts()
    there = texts._source.captions_of

    def damaged(index):
        from cascade.data.source import BadRecord

        if index == 3:
            raise BadRecord("3.png: gone", "3.png", "gone")
        return there(index)

    texts.skipped()
    texts._source.captions_of = damaged
    rng = np.random.default_rng(0)
    drawn = {texts.captions(index, rng, 1, False)[0] for index in range(50)}
    assert len(drawn) == 7 and set(texts.skipped()) == {("3.png", "gone")}
    assert texts.skipped() == []  # each once
    texts._source.captions_of = lambda index: damaged(3)
    with pytest.raises(UserError, match="1000 examples in a row have no caption"):
        texts.captions(0, rng, 1, False)


def test_batches_are_a_pure_function_of_the_step(folder, made):
    job = job_of(FolderData(path=str(folder)))
    tokenizer = Tokenizer((made / "spiece.model").read_bytes(), 64)
    every = batches(job, job.texts(), tokenizer, 30)
    later = next(batches(job, job.texts(), tokenizer, 33))
    fourth = [next(every) for _ in range(4)][3]
    jax.tree.map(np.testing.assert_array_equal, fourth, later)


def test_few_texts_have_a_vocabulary_of_their_words_and_many_letters_are_refused():
    """Without `with_words` each word is in letters, as all are alike."""
    model = train_vocabulary(with_words(["A photo of sks dog"] * 20), 360)
    tokenizer = Tokenizer(model, 16)
    assert len(tokenizer.pieces("a photo of SKS dog")) == 5
    assert tokenizer.size < 360
    assert len(tokenizer.pieces("日本")) > 2 and tokenizer.pieces("日本") != tokenizer.pieces(
        "東京"
    )
    for texts in ([], [""], ["  \n"], ["x" * 2**17]):
        with pytest.raises(UserError, match="no letters to make a vocabulary of"):
            train_vocabulary(with_words(texts), 360)
    rare = Tokenizer(train_vocabulary(with_words(["ein Karton " * 900, "ж"]), 400), 64)
    assert len(rare.pieces("ж")) <= 2 and len(rare.pieces("karton")) == 1
    assert train_vocabulary(["ein Karton " * 900], 400)  # one text, and long
    signs = ["".join(chr(0x4E00 + 20 * i + j) for j in range(20)) for i in range(50)]
    with pytest.raises(UserError, match=r"raise encoder.vocab_size by (\d+) or more") as e:
        train_vocabulary(with_words(signs), 360)
    more = int(str(e.value).split("vocab_size by ")[1].split()[0])
    assert train_vocabulary(with_words(signs), 360 + more)


def test_where_no_spaces_are_written_letters_are_pieces_and_marks_belong_to_words():
    """A caption without spaces would be one piece, and a new one of its letters in bytes."""
    told = [f"一个{c}色的{s}形, 猫" for c in "红蓝绿" for s in "圆方"]
    tokenizer = Tokenizer(train_vocabulary(with_words(told * 3), 3996), 64)
    known = {piece for text in told[:-1] for piece in tokenizer.pieces(text)}
    assert len(tokenizer.pieces(told[-1])) == 1 + len(told[-1])
    assert set(tokenizer.pieces("一个绿色的方形")) <= known
    tokenizer = Tokenizer(train_vocabulary(with_words(["ラベンダー ﾗﾍﾞﾝﾀﾞｰ สีแดง"] * 9), 3996), 64)
    assert [len(tokenizer.pieces(text)) for text in ("ラン", "สี")] == [3, 3]
    tokenizer = Tokenizer(train_vocabulary(with_words(["लाल किताब, नीला फूल"] * 9), 3996), 64)
    assert [len(tokenizer.pieces(word)) for word in ("लाल", "किताब", "नीला", "फूल")] == [1] * 4


def test_the_config_that_ships_takes_any_dataset_and_is_read_back(folder):
    job: Job = read_job(CONFIG, ["--data", f"folder:{folder}"], prog="test")
    assert isinstance(job, TextTraining) and job.data == FolderData(path=str(folder))
    assert from_json(Job, to_json(job)) == job
    tiny = read_job("configs/tiny/base64.py", ["--text-encoder", "words"], prog="test")
    assert isinstance(tiny, StageTraining) and tiny.stage.text is not None
    assert tiny.stage.text.width == job.encoder.d_model  # as the config's head says


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "blank").mkdir()
    images.save_png(tmp_path / "blank" / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "blank" / "a.txt").write_text("")
    for words, told in (
        (["--data", f"folder:{tmp_path / 'no'}"], "no such folder"),
        (["--data", f"folder:{empty}"], "holds no pictures"),
        (["--data", f"folder:{tmp_path / 'blank'}"], "have no letters"),
        (["--data", f"folder:{folder}", "--retold", "2"], "TextTraining.retold must be"),
        (["--data", f"folder:{folder}", "--encoder.vocab-size", "9"], "must leave room for 256"),
        (["--data", f"folder:{folder}", "--minutes", "1"], "TextTraining.minutes must be None"),
        (["--data", f"folder:{folder}", "--init", "scenes"], "--init"),
    ):
        with pytest.raises(SystemExit) as e:
            cli.main(["train", CONFIG, "--workdir", str(tmp_path / "run"), *words])
        err = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and err.startswith("error: ") and told in err, err
        assert not (tmp_path / "run").exists()
