"""Pictures that a model has drawn, as a dataset; and several datasets in a word."""

import json

import numpy as np
import pytest
from PIL import Image

from cascade import cli, testing
from cascade.commands.data import dataset
from cascade.data import Filters, FolderData, Mixture, SamplesData, TableData, TarData, batches, uri
from cascade.data.source import BadRecord
from cascade.errors import UserError
from cascade.runner import cascade as runner


def drawn(folder, number, prompt="a cat", sides=(8, 16)):
    """As `cascade sample` leaves it: a picture whose level is its side."""
    folder.mkdir(exist_ok=True)
    for side in sides:
        Image.new("RGB", (side, side), (side,) * 3).save(folder / f"{number:04d}_{side}.png")
    (folder / f"{number:04d}.json").write_text(json.dumps({"prompt": prompt, "seed": number}))


def test_what_cascade_sample_draws_is_read_with_its_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.Cascade, "load", lambda *args, **options: testing.cascade())
    prompts = ["a red circle", "a blue square"]
    cli.main(["sample", *prompts, "--num", "2", "--out", str(tmp_path), "--no-compilation-cache"])
    capsys.readouterr()
    source = dataset(f"samples:{tmp_path}").open(16)
    assert [source[i]["caption"] for i in range(len(source))] == np.repeat(prompts, 2).tolist()
    true = np.asarray(Image.open(tmp_path / "0002_16.png"))
    np.testing.assert_array_equal(source[2]["image"], true)


@pytest.mark.parametrize("resolution,side", [(4, 8), (8, 8), (9, 16), (16, 16), (32, 16)])
def test_the_smallest_size_that_is_large_enough_is_taken(tmp_path, resolution, side):
    drawn(tmp_path, 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "0000_path.png")
    source = SamplesData(path=str(tmp_path)).open(resolution)
    assert len(source) == 1
    assert source[0]["image"].shape == (resolution, resolution, 3)
    assert (source[0]["image"] == side).all()


def test_a_picture_without_its_prompt_is_left_out_and_told(tmp_path, capsys):
    for number in range(6):
        drawn(tmp_path, number)
    (tmp_path / "0001.json").unlink()
    (tmp_path / "0002.json").write_text("{")
    (tmp_path / "0003.json").write_text('{"prompt": 3}')
    (tmp_path / "0004.json").unlink()
    (tmp_path / "0004.json").symlink_to(__file__)
    source = SamplesData(path=str(tmp_path)).open(8)
    assert "5 pictures with captions; left out 1 without a caption" in capsys.readouterr().err
    reasons = {}
    for i in range(len(source)):
        try:
            source[i]
        except BadRecord as e:
            reasons[e.key] = e.reason
    assert reasons == {
        "0002_8.png": "whose JSON cannot be read",
        "0003_8.png": "whose caption is no text",
        "0004_8.png": "link that leads outside",
    }


def test_a_folder_that_has_no_samples_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder; give one that `cascade sample` has"):
        SamplesData(path=str(tmp_path / "no")).open(8)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    with pytest.raises(UserError, match="folder:PATH for pictures of your own"):
        SamplesData(path=str(tmp_path)).open(8)


def test_a_word_names_a_mixture_with_weights_or_without():
    a, b = FolderData(path="a"), TarData(path="b + c.tar")
    assert dataset("folder:a + tar:b + c.tar") == Mixture(sources=(a, b))
    assert dataset("3*folder:a + 0.5*tar:b + c.tar") == Mixture(sources=(a, b), weights=(3.0, 0.5))
    assert dataset("folder:a + b") == FolderData(path="a + b")
    assert dataset("2*folder:a") == Mixture(sources=(a,), weights=(2.0,))
    assert dataset("3*folder:a+1*tar:b") == dataset("3*folder:a +1*tar:b")
    assert dataset("3*folder:a+1*tar:b") == dataset("3*folder:a + 1*tar:b")
    assert dataset("folder:a+b") == FolderData(path="a+b")
    for word, told in (
        ("3*folder:a + tar:b", "give a weight to each dataset"),
        ("0*folder:a + 1*tar:b", "Mixture.weights must be above 0"),
        *((f"folder:a + tfds:{place}", "write tfds:NAME@DIR") for place in ("b", "@b", "b@")),
    ):
        with pytest.raises(UserError, match=told):
            dataset(word)


def test_a_bucket_is_no_kind_and_a_name_may_have_any_sign(monkeypatch):
    monkeypatch.setattr(uri, "dataset_in", lambda name: FolderData(path=name))
    for name in ("gs://b/pictures", "s3://b/pictures"):
        assert uri.parse(name) == FolderData(path=name)
    assert uri.parse("table:a.csv?caption_column=b=c") == TableData(
        path="a.csv", caption_column="b=c"
    )
    assert uri.parse("folder:two\nlines") == FolderData(path="two\nlines")


def test_the_words_weights_are_the_shares_of_a_run(tmp_path):
    drawn(tmp_path / "prior", 0, "a cat")
    (tmp_path / "mine").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (200 + i,) * 3).save(tmp_path / "mine" / f"{i}.png")
        (tmp_path / "mine" / f"{i}.txt").write_text("my cat")
    data = dataset(f"1*folder:{tmp_path / 'mine'} + 3*samples:{tmp_path / 'prior'}")
    found = batches(data.open(8), batch_size=400, seed=0, tokenizer=None)
    levels = next(found)["image"][:, 0, 0, 0]
    found.close()
    assert (levels == 8).sum() == pytest.approx(300, abs=4)


def test_what_filters_take_out_of_each_of_a_mixture_is_added_up(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for i in range(3 + number):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("cat" if i == 0 else "dog")
    cats = Filters(caption_regex="cat")
    sources = tuple(FolderData(path=str(folder), filters=cats) for folder in folders)
    assert list(Mixture(sources=sources).open(8).filtered.values()) == [2 + 3]


def test_a_split_and_filters_are_for_each_of_a_mixture(tmp_path, capsys):
    made = dataset("hf:a + folder:b", split="test")
    assert [getattr(d, "split", None) for d in made.sources] == ["test", None]
    drawn(tmp_path / "prior", 0, "a cat")
    drawn(tmp_path / "other", 0, "a dog")
    words = [f"samples:{tmp_path / 'prior'} + samples:{tmp_path / 'other'}"]
    words += ["--out", str(tmp_path / "sheet.png"), "--filters.caption-regex", "dog"]
    cli.main(["data", "inspect", *words])
    report = json.loads(capsys.readouterr().out)
    assert [one["count"] for one in report["bad_records"].values()] == [1], report
