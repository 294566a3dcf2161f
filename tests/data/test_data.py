"""From datasets to batches: order, resumption, sharding, crops; folders, TFDS, mistakes."""

import io
import itertools
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from written import WRITERS, records

from cascade import images
from cascade.commands import data as commands
from cascade.data import (
    BSR,
    Blur,
    Data,
    Degradation,
    FolderData,
    Source,
    TFDSData,
    batches,
    known_words,
)
from cascade.data.inspection import _spread, dataset_in, inspect
from cascade.data.source import BadRecord
from cascade.data.transforms import block_means
from cascade.errors import UserError
from cascade.scenes.captions import VOCABULARY, Facts, caption_at
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make
from cascade.scenes.render import render


class Letters:
    """A tokenizer: the first letters' codes. Picklable, as data workers need."""

    def __call__(self, texts):
        ids = np.zeros((len(texts), 8), np.int32)
        for row, text in enumerate(texts):
            codes = [ord(letter) for letter in text[:8]]
            ids[row, : len(codes)] = codes
        return SimpleNamespace(ids=ids, mask=ids > 0)


def make_batches(config=None, **options):
    config = config or ScenesData(size=20)
    options = {"resolution": 8, "batch_size": 4, "seed": 1, "tokenizer": Letters(), **options}
    return batches(config.open(options.pop("resolution")), **options)


def take(iterator, count):
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def numbered(tmp_path, count=10, kind="pairs"):
    """A dataset of flat pictures: picture i has level 10 i and caption "i"."""
    return WRITERS[kind](tmp_path, records(count))


@pytest.fixture(scope="module", params=WRITERS)
def any_kind(request, tmp_path_factory):
    """The same ten pictures as a dataset of every kind."""
    return numbered(tmp_path_factory.mktemp("any") / "d", kind=request.param)


def levels(taken):
    return [int(picture[0, 0, 0]) // 10 for batch in taken for picture in batch["image"]]


# Order.


def test_batches_hold_pictures_and_tokens_of_the_same_examples():
    source = ScenesData(size=20).open(8)
    known = {source[i]["image"].tobytes(): source[i]["caption"] for i in range(20)}
    for batch in take(make_batches(), 3):
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        assert batch["tokens"].dtype == np.int32 and batch["token_mask"].dtype == bool
        captions = [known[picture.tobytes()] for picture in batch["image"]]
        np.testing.assert_array_equal(batch["tokens"], Letters()(captions).ids)


def test_every_epoch_has_each_example_once_in_another_order(any_kind):
    taken = take(make_batches(any_kind, batch_size=5), 6)
    seen = levels(taken)
    texts = [int(bytes(row[row > 0]).decode()) for b in taken for row in b["tokens"].astype("u1")]
    assert texts == seen
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_alone():
    first, again, other = (take(make_batches(seed=seed), 2) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first[0]["image"], other[0]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(workers):
    options = {"resolution": 16, "lowres_resolution": 4, "crop": 8, "degradation": BSR()}
    whole = take(make_batches(**options), 5)
    options["workers"] = workers
    stopped = make_batches(**options)
    assert_same([next(stopped), next(stopped)], whole[:2])
    state = json.loads(json.dumps(stopped.get_state()))
    stopped.close()
    resumed = make_batches(**options)
    resumed.set_state(state)
    assert_same(take(resumed, 3), whole[2:])


@pytest.mark.parametrize("rows", [[0, 1], [2], [1, 4]])
def test_a_process_loads_its_own_rows_of_every_batch(rows, any_kind):
    whole = take(make_batches(any_kind, batch_size=5), 4)
    part = take(make_batches(any_kind, batch_size=5, rows=rows), 4)
    assert_same(part, [{name: x[np.array(rows)] for name, x in b.items()} for b in whole])


def test_a_run_resumes_on_another_number_of_processes(any_kind):
    whole = take(make_batches(any_kind, batch_size=4), 3)
    two = make_batches(any_kind, batch_size=4, rows=[2, 3])
    next(two)
    state = two.get_state()
    two.close()
    one = make_batches(any_kind, batch_size=4)
    one.set_state(state)
    assert_same(take(one, 2), whole[1:])
    with pytest.raises(UserError, match="batch size"):
        make_batches(any_kind, batch_size=3).set_state(state)


def test_data_workers_read_what_threads_read(any_kind):
    """Each has a copy of the source by pickle."""
    source = pickle.loads(pickle.dumps(any_kind.open(8)))
    whole = [any_kind.open(8)[i] for i in range(10)]
    assert [source[i]["image"].tobytes() for i in range(10)] == [
        e["image"].tobytes() for e in whole
    ]
    assert len(pickle.dumps(source)) < 10_000


@pytest.mark.parametrize("kind", ["hf", "hf parquet", "mixed"])
def test_a_worker_process_makes_the_same_batches(kind, tmp_path):
    data = numbered(tmp_path / "d", kind=kind)
    assert_same(take(make_batches(data, workers=1), 3), take(make_batches(data), 3))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"crop": 4}, "lowres_resolution"),
        ({"degradation": BSR()}, "lowres_resolution"),
        ({"lowres_resolution": 3}, "multiple"),
        ({"lowres_resolution": 4, "crop": 3}, "multiple"),
        ({"lowres_resolution": 4, "crop": 16}, "8"),
        ({"batch_size": 2, "rows": [2]}, "rows"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_batches(**options)


# Super-resolution.


@pytest.mark.parametrize("crop", [None, 16, 64])
def test_lowres_is_the_block_mean_of_the_crop_and_a_crop_of_the_whole_lowres(crop):
    scene, _ = caption_at(0, 0)
    high = render(scene, 64)
    low = high.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    options = {"resolution": 64, "lowres_resolution": 16, "crop": crop}
    batch = take(make_batches(ScenesData(size=1), batch_size=8, **options), 1)[0]
    corners = set()
    for image, lowres in zip(batch["image"], batch["lowres"], strict=True):
        side = len(image)
        assert side == (crop or 64) and len(lowres) == side // 4
        means = image.reshape(side // 4, 4, side // 4, 4, 3).mean(axis=(1, 3))
        assert np.abs(means - lowres).max() <= 0.5
        found = [
            (y, x)
            for y, x in itertools.product(range(17 - side // 4), repeat=2)
            if np.array_equal(high[4 * y : 4 * y + side, 4 * x : 4 * x + side], image)
            and np.abs(low[y : y + side // 4, x : x + side // 4] - lowres).max() <= 0.5
        ]
        assert found
        corners.add(tuple(found))
    assert len(corners) > 2 if crop == 16 else len(corners) == 1


@pytest.mark.parametrize("degradation", [Blur(share=1.0), BSR(light=False)])
def test_a_degradation_changes_lowres_alone_and_anew_every_epoch(degradation):
    options = {"resolution": 32, "lowres_resolution": 8, "batch_size": 1}
    clean = take(make_batches(ScenesData(size=1), **options), 2)
    degraded = take(make_batches(ScenesData(size=1), degradation=degradation, **options), 2)
    for a, b in zip(clean, degraded, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["lowres"].shape == b["lowres"].shape and (a["lowres"] != b["lowres"]).any()
    np.testing.assert_array_equal(clean[0]["lowres"], clean[1]["lowres"])
    assert (degraded[0]["lowres"] != degraded[1]["lowres"]).any()


class Flat(Source):
    """Example i has level 10 i."""

    def __init__(self, resolution):
        self.resolution = resolution

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.full((self.resolution, self.resolution, 3), 10 * index, np.uint8)
        return {"image": image, "caption": str(index)}


class FlatData(Data):
    def open(self, resolution):
        return Flat(resolution)


class Brighter(Degradation):
    def degraded(self, levels, rng, factor):
        return levels[::factor, ::factor] + np.float32(3.4)


def test_a_dataset_and_a_degradation_from_elsewhere_make_batches():
    options = {"lowres_resolution": 4, "crop": 4, "degradation": Brighter()}
    (batch,) = take(make_batches(FlatData(), **options), 1)
    assert sorted(levels([batch])) == [0, 1, 2, 3]
    assert batch["image"].shape == (4, 4, 4, 3) and batch["lowres"].shape == (4, 2, 2, 3)
    np.testing.assert_array_equal(batch["lowres"], batch["image"][:, ::2, ::2] + 3)


def test_block_means_are_the_downsampling_that_sampling_uses():
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    for factor in (1, 2, 4):
        wanted = np.rint(images.downsample(image.astype(np.float32), factor))
        np.testing.assert_array_equal(block_means(image, factor), wanted)


# Folders.


def test_a_folder_of_pairs_is_read_with_pictures_cropped_to_their_central_square(tmp_path):
    sub = tmp_path / "sub"
    sub.mkdir()
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    Image.fromarray(wide).save(sub / "wide.png")
    (sub / "wide.txt").write_text(" a wide picture\n")
    Image.new("L", (4, 4), 50).save(tmp_path / "gray.jpg")
    (tmp_path / "gray.txt").write_text("two words", encoding="utf-8")
    source = FolderData(path=str(tmp_path)).open(8)
    assert [source[i]["caption"] for i in range(len(source))] == ["two words", "a wide picture"]
    assert (source[1]["image"] == 200).all()
    assert source[0]["image"].shape == (8, 8, 3) and np.abs(source[0]["image"] - 50.0).max() < 3
    assert source.window(1, 2, 3, 4)["image"].shape == (4, 4, 3)


def test_a_captions_file_lists_examples_in_its_order(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")
    lines = [{"file": "b.png", "caption": "red"}, {"file": "a.png", "caption": "blue"}]
    lines.append({"file": "b.png", "caption": "also red", "more": 1})
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (tmp_path / "captions.jsonl").write_text(text)
    source = FolderData(path=str(tmp_path)).open(4)
    assert [source[i]["caption"] for i in range(3)] == ["red", "blue", "also red"]
    assert source[2]["image"][0, 0].tolist() == [255, 0, 0]


def test_captions_may_hold_any_separator_and_files_a_byte_order_mark(tmp_path):
    caption = "a red\u2028circle\u0085and\u2029more"
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a circle", encoding="utf-8-sig")
    source = FolderData(path=str(tmp_path)).open(4)
    assert source[0]["caption"] == "a circle"
    line = json.dumps({"file": "a.png", "caption": caption}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode("utf-8-sig"))
    source = FolderData(path=str(tmp_path)).open(4)
    assert [source[i]["caption"] for i in range(len(source))] == [caption, caption]


def broken_folders():
    def no_folder(path):
        return path / "absent"

    def empty(path):
        return path

    def no_caption(path):
        Image.new("RGB", (4, 4)).save(path / "a.png")
        return path

    def not_utf8(path):
        Image.new("RGB", (4, 4)).save(path / "a.png")
        (path / "a.txt").write_bytes(b"\xff\xfe\xff")
        return path

    def listing(text):
        def write(path):
            (path / "captions.jsonl").write_text(text)
            return path

        return write

    return {
        "absent: no such folder": no_folder,
        "holds no pictures": empty,
        "a.png: has no caption; write it to a.txt": no_caption,
        "a.txt: is not UTF-8": not_utf8,
        "line 1: must be JSON": listing("nonsense"),
        "line 2: must be JSON": listing('\n{"file": "a.png"}'),
        "line 1: file and caption must be text": listing('{"file": 1, "caption": "a"}'),
        "line 1: no picture": listing('{"file": "a.png", "caption": "a"}'),
        "names no picture": listing("\n"),
    }


@pytest.mark.parametrize("message,broken", broken_folders().items())
def test_a_bad_folder_is_named_with_what_is_wrong(tmp_path, message, broken):
    with pytest.raises(UserError, match=message) as caught:
        FolderData(path=str(broken(tmp_path))).open(8)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_picture_is_named_when_it_is_met(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="a.png"):
        next(make_batches(FolderData(path=str(tmp_path))))


# TFDS.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds") / "made"
    report = make(ScenesData(split="unseen", seed=4), folder, count=6, resolution=16)
    assert report["examples"] == 6 and all((folder / file).is_file() for file in report["files"])
    return folder


def test_a_tfds_dataset_reads_back_as_it_was_drawn_without_tensorflow(dataset):
    source = TFDSData(name="scenes", data_dir=str(dataset), split="unseen").open(16)
    assert len(source) == 6
    for index in range(6):
        scene, caption = caption_at(4, index, "unseen")
        np.testing.assert_array_equal(source[index]["image"], render(scene, 16))
        assert source[index]["caption"] == caption.text
    batch = next(make_batches(TFDSData(name="scenes", data_dir=str(dataset), split="unseen[:50%]")))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert len(pickle.dumps(source)) < 20_000
    assert "tensorflow" not in sys.modules


def test_pictures_of_a_tfds_dataset_are_opened_as_those_of_a_folder(dataset):
    source = TFDSData(name="scenes", data_dir=str(dataset), split="unseen").open(4)
    file = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(file, "PNG")
    source.records = [{"image": file.getvalue(), "caption": b"nothing"}]
    assert (source[0]["image"] == 255).all()


def test_what_is_damaged_in_a_tfds_dataset_is_a_bad_record_of_its_kind(dataset):
    source = TFDSData(name="scenes", data_dir=str(dataset), split="unseen").open(4)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    damaged = {
        "unreadable record": [],
        "unreadable picture": [{"image": file.getvalue()[:-20], "caption": b"a"}],
        "unreadable caption": [{"image": file.getvalue(), "caption": b"\xff"}],
    }
    for reason, held in damaged.items():
        source.records = held
        with pytest.raises(BadRecord, match="TFDS dataset scenes in .* record 0") as told:
            source[0]
        assert (told.value.key, told.value.reason) == ("record 0", reason)


def test_tfds_itself_knows_the_scenes(dataset):
    import tensorflow_datasets as tfds

    import cascade.scenes.tfds_builder  # noqa: F401

    builder = tfds.builder("scenes", data_dir=str(dataset))
    record = builder.as_data_source("unseen")[2]
    _, caption = caption_at(4, 2, "unseen")
    assert record["image"].shape == (16, 16, 3)
    assert Facts.from_json(record["facts"].decode()) == caption.facts


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"name": "scenez"}, "not found"),
        ({"data_dir": "/absent"}, "not found"),
        ({"split": "train"}, "unseen"),
        ({"caption": "text"}, "caption .Text"),
        ({"image": "caption"}, "Image"),
    ],
)
def test_a_tfds_mistake_is_explained(dataset, fields, message):
    right = {"name": "scenes", "data_dir": str(dataset), "split": "unseen"}
    with pytest.raises(UserError, match=message):
        TFDSData(**(right | fields)).open(16)


# Looking at data.


def test_inspect_draws_a_sheet_and_counts(tmp_path, capsys):
    data = numbered(tmp_path, 3)
    sheet = tmp_path / "sheet.png"
    report = inspect(data, sheet, count=2, resolution=16)
    assert (report["examples"], report["sampled"], report["distinct_captions"]) == (3, 3, 3)
    assert report["mean_rgb"] == [10, 10, 10]
    with Image.open(sheet) as drawn:
        assert drawn.width == 2 * 16 + 8 and drawn.height > 16
    with pytest.raises(UserError, match="exists already"):
        inspect(data, sheet)
    with pytest.raises(UserError, match="no folder .*absent; make it first"):
        inspect(data, tmp_path / "absent" / "sheet.png")
    for numbers in ({"count": 0}, {"resolution": 0}):
        with pytest.raises(
            UserError, match="count, resolution, sample and tokens must be positive"
        ):
            inspect(data, tmp_path / "other.png", **numbers)


def test_what_is_looked_at_is_spread_over_the_dataset():
    assert _spread(10, 5) == [0, 2, 4, 6, 8] and _spread(3, 5) == [0, 1, 2]


def test_the_data_commands_find_out_what_a_source_is(tmp_path, capsys, dataset):
    folder = tmp_path / "pictures"
    folder.mkdir()
    numbered(folder, 2)
    for source, kind in [("scenes", "ScenesData"), (folder, "FolderData"), (dataset, "TFDSData")]:
        words = [
            "inspect",
            str(source),
            "--out",
            str(tmp_path / f"{kind}.png"),
            "--split",
            "unseen",
        ]
        commands.main([*words, "--count", "2", "--resolution", "8"])
        assert json.loads(capsys.readouterr().out)["source"]["type"].split(".")[-1] == kind
    with pytest.raises(UserError, match="inspec"):
        commands.main(["inspec"])


def test_a_folder_that_is_given_holds_one_tfds_dataset_and_not_its_version_alone(tmp_path):
    def prepared(name):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dataset_info.json").write_text("{}")

    prepared("birds/small/1.0.0")
    assert dataset_in(str(tmp_path)) == TFDSData(name="birds/small", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="found 1.0.0/dataset_info.json"):
        dataset_in(str(tmp_path / "birds" / "small"))
    with pytest.raises(UserError, match="give the folder that holds .*found dataset_info.json"):
        dataset_in(str(tmp_path / "birds" / "small" / "1.0.0"))
    prepared("birds/small/1.0.1")
    assert dataset_in(str(tmp_path)).name == "birds/small"
    prepared("fish/1.0.0")
    with pytest.raises(UserError, match="holds one dataset .*found birds/.*, fish/1.0.0"):
        dataset_in(str(tmp_path))


def test_captions_are_read_without_their_pictures(tmp_path, dataset):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a red circle")
    assert FolderData(path=str(tmp_path)).open(8).captions_of(0) == ("a red circle",)
    for data in (
        ScenesData(seed=3),
        TFDSData(name="scenes", data_dir=str(dataset), split="unseen"),
    ):
        source = data.open(8)
        assert [source.captions_of(i) for i in range(3)] == [
            (source[i]["caption"],) for i in range(3)
        ]


def test_known_words_are_those_of_closed_vocabularies_only():
    class TwoWords(Data):
        vocabulary = ("z", "circle")

    scenes = ScenesData()
    assert known_words([scenes, ScenesData(split="long")]) == sorted(VOCABULARY)
    assert known_words([scenes, TwoWords()]) == [*sorted(VOCABULARY), "z"]
    for data in (FolderData(path="x"), TFDSData(name="x", data_dir="x"), Data()):
        assert known_words([scenes, data]) == []
    assert known_words([]) == []


def test_importing_the_room_loads_neither_jax_nor_grain_nor_tfds():
    heavy = "{'jax', 'grain', 'tensorflow_datasets', 'pyarrow'}"
    code = f"import sys, cascade.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
