"""`cascade eval fid` and `cascade eval clip`: features on disk, and the commands."""

import contextlib
import dataclasses
import json
import os
import resource

import jax
import numpy as np
import processes
import pytest
import safetensors.numpy
from fixtures.feature_networks import clip_folder
from jax.experimental import multihost_utils
from PIL import Image, ImageFilter

from cascade import images
from cascade.commands import eval as evaluate
from cascade.data.source import BadRecord, Source
from cascade.errors import UserError
from cascade.evaluation import clip_score, distances, features, resumable
from cascade.evaluation.distances import Statistics
from cascade.published import clip
from cascade.scenes.dataset import ScenesData
from cascade.scenes.render import render
from cascade.scenes.spec import scene_at


class Numbers(Source):
    """Picture i is a plain one of level i; those named cannot be read."""

    resolution = 8

    def __init__(self, count, bad=()):
        self.count, self.bad, self.read = count, bad, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.bad:
            raise BadRecord(f"{index} is bad", str(index), "bad")
        return {"image": np.full((8, 8, 3), index, np.uint8), "caption": str(index)}


def means(examples):
    return np.array([[e["image"].mean(), 1] for e in examples], np.float32)


def test_features_lie_in_parts_and_what_is_there_is_not_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 10)
    done = []
    stored = features.store(Numbers(25), 23, tmp_path, means, batch=4, advance=done.append)
    assert len(stored) == sum(done) == 23 and len(stored.files) == 3
    np.testing.assert_array_equal(np.concatenate(list(stored))[:, 0], np.arange(23))
    np.testing.assert_array_equal(stored.take(np.array([22, 3, 11, 3]))[:, 0], [22, 3, 11, 3])
    stored.files[1].unlink()
    source = Numbers(25)
    again = features.store(source, 23, tmp_path, means, batch=4)
    assert sorted(source.read) == list(range(10, 20))
    np.testing.assert_array_equal(np.concatenate(list(again))[:, 0], np.arange(23))


def test_each_process_makes_parts_of_its_own(tmp_path, monkeypatch):
    """And waits for the others, whose parts it then has."""
    monkeypatch.setattr(features, "PART", 10)
    source = Numbers(45)

    def wait(name):
        with monkeypatch.context() as alone:
            alone.setattr(jax, "process_count", lambda: 1)
            alone.setattr(jax, "process_index", lambda: 0)
            features.store(Numbers(45), 45, tmp_path, means, batch=4)

    monkeypatch.setattr(multihost_utils, "sync_global_devices", wait)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stored = features.store(source, 45, tmp_path, means, batch=4)
    assert sorted(source.read) == [*range(10, 20), *range(30, 40)]
    np.testing.assert_array_equal(np.concatenate(list(stored))[:, 0], np.arange(45))


def test_pictures_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 10)
    source, done = Numbers(20, bad={0, 4, 13}), []
    stored = features.store(source, 20, tmp_path, means, batch=4, advance=done.append)
    expected = [i for i in range(20) if i not in source.bad]
    assert sum(done) == 20 and list(stored.indices) == expected
    np.testing.assert_array_equal(stored.take(np.arange(17))[:, 0], expected)
    assert stored.statistics("n").count == 17
    unlucky = features.store(Numbers(21, bad={*range(10), 20}), 21, tmp_path / "o", means, batch=4)
    np.testing.assert_array_equal(unlucky.take(np.arange(10))[:, 0], np.arange(10, 20))
    assert unlucky.statistics("n").count == 10


def test_features_are_those_of_each_picture_on_eight_devices_and_in_any_batch():
    network = features.of_random()
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    assert jax.local_device_count() == 8
    found = network(pictures, 8)
    assert found.shape == (5, 120)
    one = np.stack([features.quality.features_of(p) for p in pictures])
    assert np.allclose(found, one, atol=1e-6)
    assert np.allclose(found[:2], network(pictures[:2], 8), atol=1e-6)


def run(capsys, *argv):
    evaluate.main([*map(str, argv), "--no-compilation-cache"])
    return json.loads(capsys.readouterr().out)


def write_pictures(folder, change, start=0, count=40, side=32):
    folder.mkdir()
    for i in range(count):
        picture = Image.fromarray(render(scene_at(start, i, "train"), side))
        change(picture).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("a scene")
    return folder


def noisy(sigma):
    def change(picture):
        z = np.random.default_rng(0).standard_normal(np.shape(picture))
        return Image.fromarray(np.clip(picture + sigma * z, 0, 255).astype(np.uint8))

    return change


PROXY = ("--network", "random", "--side", "32")


def test_the_distance_rises_with_noise_with_blur_and_with_modes_that_are_dropped(tmp_path, capsys):
    plain = write_pictures(tmp_path / "plain", lambda p: p)
    worse = {
        "none": lambda p: p,
        "little noise": noisy(8),
        "much noise": noisy(40),
        "little blur": lambda p: p.filter(ImageFilter.GaussianBlur(1)),
        "much blur": lambda p: p.filter(ImageFilter.GaussianBlur(4)),
    }
    found = {
        name: run(capsys, "fid", write_pictures(tmp_path / name, change), plain, *PROXY)["fd_proxy"]
        for name, change in worse.items()
    }
    assert found["none"] == pytest.approx(0, abs=1e-5)
    assert 0.01 < found["little noise"] < found["much noise"]
    assert 0.01 < found["little blur"] < found["much blur"]
    one = next(iter(sorted((tmp_path / "none").glob("*.png")))).read_bytes()
    dropped = tmp_path / "dropped"
    dropped.mkdir()
    for i in range(40):
        (dropped / f"{i:03d}.png").write_bytes(one)
        (dropped / f"{i:03d}.txt").write_text("a scene")
    report = run(capsys, "fid", dropped, plain, *PROXY)
    assert report["fd_proxy"] > found["little blur"] and report["coverage"] < 0.2


def test_the_command_writes_what_it_prints_and_statistics_stand_for_pictures(tmp_path, capsys):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s) for n, s in (("a", 1), ("b", 2)))
    kept = tmp_path / "a.npz"
    argv = ("fid", a, b, *PROXY, "--out", tmp_path / "out", "--save-statistics", kept)
    report = run(capsys, *argv)
    assert report == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "sheet.png"}
    assert np.asarray(images.load_image(tmp_path / "out" / "sheet.png")).std() > 10
    assert report["pictures"] == {"what": str(a), "pictures": 40, "left_out": 0}
    assert report["kd_proxy"]["subset_size"] == 20 and "fid" not in report and "kid" not in report
    by_file = run(capsys, "fid", kept, b, *PROXY)
    assert by_file["fd_proxy"] == pytest.approx(report["fd_proxy"]) and by_file["kd_proxy"] is None
    alone = run(capsys, "fid", b, *PROXY, "--save-statistics", tmp_path / "b.npz")
    assert "fd_proxy" not in alone and Statistics.load(tmp_path / "b.npz").count == 40
    with pytest.raises(UserError, match="a.npz: exists already"):
        run(capsys, *argv)
    with pytest.raises(UserError, match=r"out: holds (results|sheet).*name a new or empty folder"):
        run(capsys, *argv[:-2])


def test_figures_are_of_the_drawn_beside_the_true_and_the_seed_chooses_subsets(tmp_path, capsys):
    a = write_pictures(tmp_path / "a", noisy(12), start=1, count=9)
    b = write_pictures(tmp_path / "b", lambda p: p, start=2, count=14)
    network, rows = features.of_random(), []
    for folder in (a, b):
        some = [np.asarray(images.load_image(file)) for file in sorted(folder.glob("*.png"))]
        rows.append(network(some, 16))
    reports = [run(capsys, "fid", a, b, *PROXY, "--seed", seed) for seed in (0, 1)]
    first, second = reports
    for name, value in distances.neighbourhoods(*rows).items():
        assert first[name] == pytest.approx(value, abs=1e-5)
    takes = (rows[0].__getitem__, rows[1].__getitem__)
    kernel = distances.kernel(*takes, (9, 14), subsets=100, size=4, seed=1)
    assert second["kd_proxy"]["mean"] == pytest.approx(kernel["mean"], abs=1e-6)
    assert first["kd_proxy"]["mean"] != second["kd_proxy"]["mean"]
    assert first["fd_proxy"] == second["fd_proxy"]
    few = [run(capsys, "fid", "scenes:seen", b, *PROXY, "--count", 7, "--seed", s) for s in (0, 1)]
    assert few[0]["fd_proxy"] != few[1]["fd_proxy"] and few[0]["reference"]["pictures"] == 7


def test_the_sheet_has_the_best_first_and_the_worst_last(tmp_path, monkeypatch):
    said = []
    true = images.captioned

    def captioned(pictures, texts):
        said.extend(texts)
        return true(pictures, texts)

    monkeypatch.setattr(images, "captioned", captioned)
    found = clip_score.Scores(
        cosines=np.linspace(0.1, 0.4, 30, dtype=np.float32),
        retrieved=np.ones(30, bool),
        others=1,
        indices=np.arange(100, 130),
    )
    clip_score.sheet(tmp_path, Numbers(200), found)
    numbers = [int(text.split()[1]) for text in said]
    assert numbers == [*range(129, 117, -1), *range(111, 99, -1)]
    assert said[0] == "40.0 129" and said[-1] == "10.0 100"


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s) for n, s in (("a", 1), ("b", 2)))
    argv = ("fid", a, b, *PROXY, "--out", tmp_path / "out")
    expected = run(capsys, *argv[:-2])
    monkeypatch.setattr(features, "PART", 16)
    true, count = np.save, []

    def stopped(*args):
        count.append(args)
        if len(count) == 4:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(np, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *argv)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {resumable.NAME}
    assert run(capsys, *argv)["fd_proxy"] == pytest.approx(expected["fd_proxy"], rel=1e-6)
    assert len(count) == 4 + 6 - 3  # of six parts, three were there


def share(argv, printed):
    with open(f"{printed}_{jax_process()}", "w") as out, contextlib.redirect_stdout(out):
        evaluate.main(argv)


def jax_process():
    return os.environ["JAX_PROCESS_ID"]


def test_several_processes_share_the_pictures_and_the_first_tells(tmp_path, capsys):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s) for n, s in (("a", 1), ("b", 2)))
    argv = [str(w) for w in ("fid", a, b, *PROXY)]
    expected = run(capsys, *argv)
    argv += ["--no-compilation-cache", "--out", str(tmp_path / "out")]
    group = processes.start_group(2, share, argv, str(tmp_path / "printed"))
    assert processes.codes(group) == [0, 0]
    told, silence = ((tmp_path / f"printed_{i}").read_text() for i in range(2))
    assert json.loads(told)["fd_proxy"] == pytest.approx(expected["fd_proxy"], rel=1e-6)
    assert silence == ""


def test_fid_is_the_word_for_inceptions_alone(tmp_path, capsys, monkeypatch):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s, count=4) for n, s in FEW)
    argv = ("fid", a, b, "--side", 32, "--batch-size", 8)
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    report = run(capsys, *argv, "--network", "clip", "--weights", folder)
    assert report["fd_clip"] > 0 and report["kd_clip"] is not None and report["precision"] is None
    assert report["network"] == f"clip ({folder})" and len(report["weights_sha256"]) == 64
    assert "fid" not in report and "kid" not in report
    asked = []

    def small(weights, like):  # Inception's place; its own values are tested by themselves
        asked.append((weights, like))
        return dataclasses.replace(features.of_random(), name="inception", suffix="")

    monkeypatch.setattr(features, "of_inception", small)
    report = run(capsys, *argv, "--weights", "w", "--like", "pytorch-fid")
    assert report["fid"] > 0 and report["kid"]["subset_size"] == 2 and "fd" not in report
    assert asked == [("w", "pytorch-fid")]


FEW = (("a", 1), ("b", 2))


@pytest.mark.parametrize(
    "argv,said",
    [
        (["fid", "a"], "REFERENCE is missing"),
        (["fid", "a", "b"], "--weights FILE is missing: download https://github.com/mseitzer"),
        (["fid", "a", "b", *PROXY, "--weights", "w"], "a random network has none"),
        (["fid", "a", "b", *PROXY, "--count", "1"], "--count must be 2 or more, got 1"),
        (["fid", "a", "b", "--side", "4"], "--side must be 8 or more, got 4"),
        (["fid", "a", "b", "--side", "5000"], "--side must be at most 4096, got 5000"),
        (["fid", "a", "b", *PROXY, "--batch-size", "1000000000"], "--batch-size must be at most"),
        (["fid", "a", "b", *PROXY, "--seed", "-1"], "--seed must be in [0, 2^32), got -1"),
        (["fid", "", "b", *PROXY], "the name of a file or folder is empty"),
        (["fid", "scenes:seen", "a", *PROXY], "scenes have no end; say how many with --count"),
        (["fid", "a.npz", "a", *PROXY], "statistics a.npz: no such file"),
        (["fid", "none", "a", *PROXY], "none"),
        (["fid", "a", *PROXY, "--save-statistics", "s.txt"], "must end with .npz"),
        (["clip", "samples:none"], "no such folder"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_pictures(tmp_path / name, lambda p: p, count=3)
    with pytest.raises(UserError) as e:
        run(capsys, *argv)
    assert said in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_statistics_of_another_network_are_refused(tmp_path, capsys):
    a = write_pictures(tmp_path / "a", lambda p: p, count=4)
    run(capsys, "fid", a, *PROXY, "--save-statistics", tmp_path / "s.npz")
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    argv = ("fid", tmp_path / "s.npz", a, "--side", 32, "--network", "clip", "--weights", folder)
    with pytest.raises(UserError, match=r"are of 120 .* of \(random, pic.*these are 8 of \(clip"):
        run(capsys, *argv)
    with pytest.raises(UserError, match=r"\(random, pictures of 32 px\), and these .* of 16 px\)"):
        run(capsys, "fid", tmp_path / "s.npz", a, "--network", "random", "--side", 16)


def test_a_picture_is_retrieved_if_its_own_caption_is_the_nearest():
    """Of n random directions in so many channels the nearest to a picture is its own by chance in
    one of n cases; equal captions are no others to each other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 64)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n = np.arange(300)
    own = clip_score.scores(x, x, n)
    assert own.retrieved.all() and own.others == 99
    assert own.as_json()["clip_score"] == pytest.approx(100, abs=1e-3)
    chance = clip_score.scores(x, np.roll(x, 1, axis=0), n).as_json()
    low, high = chance["r_precision"]["interval"]
    assert low <= 0.01 <= high and abs(chance["clip_score"]) < 10
    other = clip_score.scores(x, np.roll(x, 1, axis=0), n, seed=1)
    same = clip_score.scores(x, np.roll(x, 1, axis=0), n, seed=0)
    assert (other.retrieved != same.retrieved).any()
    again = x[[0, 1, 0, 1]]
    twice = clip_score.scores(again, again, np.array([5, 7, 5, 7]))
    assert twice.retrieved.all() and twice.others == 1


def test_the_interval_of_the_score_holds_the_mean_in_its_share_of_cases():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        cosines = np.clip(rng.normal(0.25, 0.05, 60), -1, 1)
        found = clip_score.Scores(
            cosines=cosines, retrieved=np.ones(60, bool), others=0, indices=np.arange(60)
        ).as_json()
        low, high = found["clip_score_interval"]
        held += low <= 25 <= high
    assert 0.91 < held / 400 < 0.98 and "r_precision" not in found


def test_the_clip_command_scores_samples_by_their_prompts(tmp_path, capsys):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for i, prompt in enumerate(["a red circle", "a blue circle", "a red circle", "ab cd"]):
        Image.fromarray(render(scene_at(0, i, "train"), 16)).save(drawn / f"{i:04d}_16.png")
        (drawn / f"{i:04d}.json").write_text(json.dumps({"prompt": prompt}))
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    argv = ("clip", f"samples:{drawn}", "--weights", folder, "--side", 16, "--batch-size", 3)
    report = run(capsys, *argv, "--out", tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", *FILES}
    model = clip.load(folder)
    pictures = np.stack(
        [np.asarray(images.load_image(drawn / f"{i:04d}_16.png")) for i in range(4)]
    )
    prepared = np.stack([model.prepare(picture) for picture in pictures])
    texts = model.texts(["a red circle", "a blue circle", "a red circle", "ab cd"])
    cosines = (np.asarray(model.images(model.params, jax.numpy.asarray(prepared))) * texts).sum(1)
    assert report["clip_score"] == pytest.approx(np.maximum(100 * cosines, 0).mean(), abs=1e-2)
    assert report["r_precision"]["others"] == 2 and report["pictures"] == 4


FILES = {"clip.png", "sheet.png"}


def test_features_lie_elsewhere_wherever_anything_differs_that_they_are_made_of(tmp_path):
    network, data, source = features.of_random(), ScenesData(split="seen"), Numbers(9)
    other_side = Numbers(9)
    other_side.resolution = 16
    made_of = [
        (network, data, source, 5),
        (network, data, source, 6),
        (network, data, Numbers(10), 5),
        (network, data, other_side, 5),
        (network, dataclasses.replace(data, seed=1), source, 5),
        (network, dataclasses.replace(data, split="unseen"), source, 5),
        *(
            (dataclasses.replace(network, **{name: "x"}), data, source, 5)
            for name in ("name", "digest", "settings")
        ),
    ]
    found = [features.place(tmp_path, *some) for some in made_of]
    assert len(set(found)) == len(made_of) and {p.parent for p in found} == {tmp_path}
    assert features.place(tmp_path, *made_of[0]) == found[0]


def test_what_clips_see_depends_on_more_than_their_weights(tmp_path):
    model = clip.load(clip_folder(tmp_path / "clip", tokenizer=True))
    other = dataclasses.replace(model, std=(1.0, 1.0, 1.0))
    one, two = features.of_clip(model), features.of_clip(other)
    assert one.digest == two.digest == model.digest and len(model.digest) == 64
    assert one.settings != two.settings


def test_a_second_clip_does_not_judge_by_the_first_ones_embeddings(tmp_path, capsys, monkeypatch):
    a = write_pictures(tmp_path / "a", lambda p: p, count=6)
    for name in ("one", "two"):
        clip_folder(tmp_path / name, tokenizer=True)
    file = tmp_path / "two" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["text_projection.weight"] *= -1
    safetensors.numpy.save_file(tensors, file)
    argv = ("clip", a, "--side", 32, "--batch-size", 6)
    seeds, true = [], clip_score.scores
    monkeypatch.setattr(clip_score, "scores", lambda *a: seeds.append(a[-1]) or true(*a))
    expected = run(capsys, *argv, "--weights", tmp_path / "two", "--seed", 7)
    assert seeds == [7]
    with monkeypatch.context() as patched:
        patched.setattr(clip_score, "sheet", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(capsys, *argv, "--weights", tmp_path / "one", "--out", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [resumable.NAME]
    found = run(capsys, *argv, "--weights", tmp_path / "two", "--out", tmp_path / "out")
    assert found == expected and found["clip_score"] > 0


def test_a_broken_picture_is_left_out_of_figures_and_sheet_and_captions_need_not_be(
    tmp_path, capsys
):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s, count=9) for n, s in FEW)
    (a / "001.png").write_bytes(b"no picture")
    for file in [*a.glob("*.txt"), *b.glob("*.txt")]:
        file.unlink()
    report = run(capsys, "fid", a, f"folder:{b}", *PROXY, "--out", tmp_path / "out")
    assert report["pictures"]["left_out"] == 1 and report["reference"]["pictures"] == 9
    assert (tmp_path / "out" / "sheet.png").is_file()
    with pytest.raises(UserError, match=r"has no caption; write it to 000\.txt"):
        run(capsys, "clip", b, "--side", 32)


def test_weights_that_give_no_numbers_are_told_of(tmp_path, capsys):
    a = write_pictures(tmp_path / "a", lambda p: p, count=3)
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    for name in ("visual_projection.weight", "text_projection.weight"):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        safetensors.numpy.save_file(
            {**tensors, name: np.zeros_like(tensors[name])}, tmp_path / "clip" / "model.safetensors"
        )
        with pytest.raises(UserError, match="not finite numbers; its weights are damaged"):
            run(capsys, "clip", a, "--side", 32, "--weights", folder, "--out", tmp_path / name)
        assert not list((tmp_path / name).glob("results.json"))
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_one_picture_has_no_interval(tmp_path, capsys):
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    a = write_pictures(tmp_path / "a", lambda p: p, count=2)
    (a / "000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 pictures of 2 can be read; two are needed"):
        run(capsys, "clip", a, "--side", 32, "--weights", folder)
    one = write_pictures(tmp_path / "one", lambda p: p, count=1)
    with pytest.raises(UserError, match="has 1 picture; two or more are needed"):
        run(capsys, "clip", one, "--side", 32, "--weights", folder)


def test_statistics_are_kept_at_the_very_end_so_that_a_stopped_run_can_go_on(
    tmp_path, capsys, monkeypatch
):
    a, b = (write_pictures(tmp_path / n, lambda p: p, start=s, count=9) for n, s in FEW)
    argv = ("fid", a, b, *PROXY, "--out", tmp_path / "out", "--save-statistics", tmp_path / "s.npz")
    with monkeypatch.context() as patched:
        patched.setattr(Statistics, "save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(capsys, *argv)
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert there == {"results.json", "sheet.png", resumable.NAME}
    assert run(capsys, *argv)["fd_proxy"] > 0 and (tmp_path / "s.npz").is_file()
    nowhere = ("--save-statistics", tmp_path / "none" / "s.npz")
    with pytest.raises(UserError, match="none is no folder that can be written to; make it"):
        run(capsys, "fid", a, *PROXY, *nowhere)


def test_a_folder_is_one_runs_and_what_others_put_there_stays(tmp_path):
    out = tmp_path / "out"
    with resumable.folder(out, "a run") as (where, inside):
        assert where == out and inside.is_dir()
        with pytest.raises(UserError, match="a run holds this folder"):
            resumable.folder(out, "a run").__enter__()
        assert inside.is_dir()
        (inside / "part").write_text("x")
    assert not out.exists()  # nothing was written into it
    with pytest.raises(KeyError), resumable.folder(out, "a run"):
        raise KeyError  # a mistake, before anything was made
    assert not out.exists()
    with pytest.raises(KeyError), resumable.folder(out, "a run") as (_, inside):
        (inside / "part").write_text("x")
        raise KeyError
    (out / f".results.json.{'0' * 16}.partial").write_text("of a process that was killed")
    (out / "results.json").write_text("whole, but its process was killed after it")
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds mine\.txt"):
        resumable.folder(out, "a run").__enter__()
    (out / "mine.txt").unlink()
    with resumable.folder(out, "a run") as (_, inside):
        assert (inside / "part").read_text() == "x"
    assert [p.name for p in out.iterdir()] == ["results.json"]
    with pytest.raises(UserError, match=r"holds results\.json"):
        resumable.folder(out, "a run").__enter__()


def test_a_full_disk_is_told_of_and_nothing_half_written_is_left(tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = pytest.raises(UserError, match=r"out: cannot be written to \(File too.*make room")
    with told, resumable.folder(tmp_path / "out", "a run") as (_, inside):
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, usual[1]))
        try:
            features.store(Numbers(20), 20, inside, means, batch=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="out: is a file; name a folder"):
        resumable.folder(tmp_path / "out", "a run").__enter__()
    assert (tmp_path / "out").read_text() == "x"


def test_nothing_is_written_through_a_link(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / resumable.NAME).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"holds {resumable.NAME}"):
        resumable.folder(out, "a run").__enter__()
    assert list(elsewhere.iterdir()) == []
