"""`cascade eval coco`: the draw, what is drawn and compared, that it goes on where it was."""

import contextlib
import csv
import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import model_folders
import numpy as np
import processes
import pytest
import safetensors.numpy
from fixtures.feature_networks import clip_folder
from matplotlib.figure import Figure
from PIL import Image

from cascade import images, testing
from cascade.commands import eval as evaluate
from cascade.errors import UserError
from cascade.evaluation import clip_score, coco, coco_report, distances, features, quality
from cascade.published import clip
from cascade.runner.cascade import Cascade
from cascade.runner.picture import Picture
from cascade.scenes.render import render
from cascade.scenes.spec import scene_at
from cascade.storage import paths

COUNT = 12
"""True pictures; each has two captions."""


@pytest.fixture(scope="module")
def cascade():
    found = testing.cascade([testing.smallest_stage(), testing.super_resolution_stage(8)])
    found.name, found.digest = "tiny", "abc"
    return found


@pytest.fixture
def loaded(cascade, monkeypatch):
    """Makes every model the tiny one, of 8 and 16 px."""
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    return cascade


def write_coco(folder):
    """val2014.json and val2014/ with pictures of 24 x 16 px, red left and right of the square."""
    (folder / "val2014").mkdir(parents=True)
    about = {"info": {}, "images": [], "annotations": []}
    for i in reversed(range(COUNT)):
        name = f"COCO_val2014_{i:012d}.png"
        canvas = np.zeros((16, 24, 3), np.uint8) + np.uint8([255, 0, 0])
        canvas[:, 4:20] = render(scene_at(3, i, "train"), 16)
        Image.fromarray(canvas).save(folder / "val2014" / name)
        about["images"].append({"id": 50 + i, "file_name": name, "height": 16, "width": 24})
        for k in range(2):
            said = f" caption {i} number {k}\n"
            about["annotations"].append({"image_id": 50 + i, "id": 7 * i + k, "caption": said})
    (folder / "val2014.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def words(val, out, *more, prompts=6):
    said = ["coco", val / "val2014.json", "--out", out, "--network", "random", "--side", 16]
    if "--reference" not in more:
        said += ["--pictures", val / "val2014"]
    said += ["--prompts", prompts, "--batch", 2, "--batch-size", 4, *more]
    return [*map(str, said), "--no-compilation-cache"]


def run(capsys, *args, **options):
    evaluate.main(words(*args, **options))
    return json.loads(capsys.readouterr().out)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines(out):
    return [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]


def test_the_draw_is_uniform_seeded_without_replacement_and_a_prefix(val):
    captions = coco.read(val / "val2014.json")
    assert len(captions.annotations) == 2 * COUNT
    every = coco.draw(captions, 2 * COUNT, 5)
    assert sorted(one.id for one in every) == [one.id for one in captions.annotations]
    assert coco.draw(captions, 7, 5) == every[:7] and coco.draw(captions, 7, 6) != every[:7]
    firsts, pairs = Counter(), 0
    for seed in range(4800):
        first, second = coco.draw(captions, 2, seed)
        firsts[first.id] += 1
        pairs += first.image_id == second.image_id
    chi_squared = sum((count - 200) ** 2 / 200 for count in firsts.values())
    assert len(firsts) == 24 and chi_squared < 49.7  # one in a thousand, of 23 degrees
    assert abs(pairs / 4800 - 1 / 23) < 4 * (1 / 23 / 4800) ** 0.5


def test_the_order_of_the_file_does_not_change_the_draw(val, tmp_path):
    value = json.loads((val / "val2014.json").read_text())
    value["annotations"] = value["annotations"][::-1]
    value["annotations"].append({"image_id": 50, "id": -1, "caption": " \n"})
    (tmp_path / "other.json").write_text(json.dumps(value))
    one, other = coco.read(val / "val2014.json"), coco.read(tmp_path / "other.json")
    assert coco.draw(one, 24, 0) == coco.draw(other, 24, 0)


def test_what_is_on_disk_is_what_is_drawn_and_compared(loaded, val, tmp_path, capsys):
    out = tmp_path / "out"
    report = run(capsys, val, out, "--seed", 3)
    assert report == json.loads((out / "results.json").read_text())
    assert {p.name for p in out.iterdir()} == {
        *("captions.jsonl", "run.json", "guidance-1", "results.json", "sheet.png")
    }
    expected = coco.draw(coco.read(val / "val2014.json"), 6, 3)
    assert lines(out) == [
        {
            **{"annotation_id": one.id, "image_id": one.image_id, "caption": one.caption},
            "seed": 3 + 1000 * i,
        }
        for i, one in enumerate(expected)
    ]
    for i, line in enumerate(lines(out)):
        about = json.loads((out / "guidance-1" / f"{i:04d}.json").read_text())
        assert (about["prompt"], about["seed"]) == (line["caption"], line["seed"])
        assert about["of_set"]["annotation_id"] == line["annotation_id"]
        again = loaded(line["caption"], seed=line["seed"], batch_size=2)[0].images[16]
        there = np.asarray(images.load_image(out / "guidance-1" / f"{i:04d}_16.png"))
        assert np.abs(there.astype(int) - again).max() <= 1
    (point,) = report["points"]
    drawn = [np.asarray(images.load_image(f)) for f in sorted(out.glob("guidance-1/*_16.png"))]
    true = [render(scene_at(3, i, "train"), 16) for i in range(COUNT)]  # without the red
    by_hand = [distances.statistics([quality.features(some)]) for some in (drawn, true)]
    assert point["fd_proxy"] == pytest.approx(distances.frechet(*by_hand), rel=1e-3)
    assert (point["pictures"], report["reference"]["pictures"]) == (6, COUNT)
    assert (report["model_sha256"], report["prompts"], report["until"]) == ("abc", 6, 16)
    assert "guidance" not in report["settings"]["base8"] and point["guidance"] == 1.0


def test_the_sheet_has_each_caption_with_its_own_true_picture(loaded, val, tmp_path, monkeypatch):
    cells = []
    grid = images.grid
    monkeypatch.setattr(images, "grid", lambda p, **k: cells.append(p) or grid(p, **k))
    evaluate.main(words(val, tmp_path / "out", "--guidance", "1,2"))
    for row, line in zip(cells[:6], lines(tmp_path / "out"), strict=True):
        expected = render(scene_at(3, line["image_id"] - 50, "train"), 16)
        assert len(row) == 3 and (row[2][:16, :16] == expected).all()


def test_true_pictures_are_at_no_distance_from_themselves(
    loaded, val, tmp_path, monkeypatch, capsys
):
    captions = coco.read(val / "val2014.json")
    source = coco.TruePictures(captions, val / "val2014", 16)
    places = {one.caption: source.places[one.image_id] for one in captions.annotations}

    def itself(prompts, *, seed, **_):
        for prompt, own in zip(prompts, seed, strict=True):
            true = source[places[prompt]]["image"]
            yield Picture(prompt, own, {8: true[::2, ::2], 16: true}, {"prompt": prompt}, {})

    far = run(capsys, val, tmp_path / "drawn", prompts=24)["points"][0]
    monkeypatch.setattr(loaded, "draw", itself)
    near = run(capsys, val, tmp_path / "true", prompts=24)["points"][0]
    # Each picture twice, so that n - 1 below the covariance's line is another: nearly 0.
    assert near["fd_proxy"] < 0.01 * far["fd_proxy"]
    assert near["precision"] == near["recall"] == 1.0 and far["precision"] < 0.9


@pytest.mark.parametrize("after", [0, 2, 4, 13, 26, 45, 50])
def test_a_run_that_is_killed_and_given_again_equals_an_uninterrupted_one(
    loaded, val, uninterrupted, tmp_path, monkeypatch, capsys, after
):
    """Killed when so many files have been written, and nothing more is."""
    left, replace = [after], os.replace

    class Killed(BaseException):
        pass

    def replacing(source, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(paths.os, "replace", replacing)
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    with pytest.raises(Killed):
        run(capsys, val, out, *SWEEP)
    monkeypatch.setattr(paths.os, "replace", replace)
    whole = len(list(out.glob("guidance-*/[0-9]*.json")))
    made = len(list(out.glob("unfinished-eval/*/part-*")))
    drawn, parts = [], []
    draw, save = loaded.draw, np.save
    monkeypatch.setattr(loaded, "draw", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    monkeypatch.setattr(np, "save", lambda *a: parts.append(a) or save(*a))
    capsys.readouterr()
    run(capsys, val, out, *SWEEP)
    assert contents(out) == uninterrupted
    assert len(drawn) == 6 - whole // 2 and len(parts) == 3 - made


SWEEP = ("--guidance", "1,2.5")


@pytest.fixture(scope="module")
def whole(cascade, val, tmp_path_factory):
    """The folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
        patch.chdir(folder)
        evaluate.main(words(val, "out", *SWEEP))
    return folder / "out"


@pytest.fixture
def uninterrupted(whole):
    return contents(whole)


def test_every_weight_has_the_same_captions_and_seeds(uninterrupted):
    names = {name for name in uninterrupted if "/" not in name}
    assert names == {
        *("captions.jsonl", "run.json", "results.json", "sheet.png", "pareto.png", "pareto.csv")
    }
    told = [
        [json.loads(uninterrupted[f"guidance-{w}/{i:04d}.json"]) for i in range(6)]
        for w in ("1", "2.5")
    ]
    for one, other in zip(*told, strict=True):
        assert (one["prompt"], one["seed"]) == (other["prompt"], other["seed"])
        assert one["stages"]["base8"]["guidance"] == 1 and one["stages"]["sr16"]["guidance"] == 1
        assert other["stages"]["base8"]["guidance"] == 2.5
        assert other["stages"]["sr16"]["guidance"] == 1
    points = json.loads(uninterrupted["results.json"])["points"]
    assert points[0]["fd_proxy"] != points[1]["fd_proxy"]
    rows = list(csv.DictReader(uninterrupted["pareto.csv"].decode().splitlines()))
    for row, point in zip(rows, points, strict=True):
        assert float(row["guidance"]) == point["guidance"]
        assert float(row["fd_proxy"]) == point["fd_proxy"]
        assert float(row["kd_proxy"]) == point["kd_proxy"]["mean"]


def test_weights_are_added_to_those_that_are_there(loaded, val, tmp_path, monkeypatch, capsys):
    out, drawn, draw = tmp_path / "out", [], loaded.draw
    monkeypatch.setattr(loaded, "draw", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    run(capsys, val, out)
    assert not (out / "pareto.png").exists() and len(drawn) == 3
    report = run(capsys, val, out, "--guidance", "3,1")
    assert [p["guidance"] for p in report["points"]] == [3, 1] and len(drawn) == 6
    assert (out / "pareto.png").exists()


def test_the_curve_is_fid_over_clip_score_by_weight(loaded, val, tmp_path, monkeypatch, capsys):
    shown = {}

    def saved(figure, *_, **__):
        (axes,) = figure.axes
        if axes.lines:
            shown["points"] = axes.lines[0].get_xydata().tolist()
            shown["labels"] = [text.get_text() for text in axes.texts]
            shown["words"] = (axes.get_xlabel(), axes.get_ylabel(), axes.get_title())

    monkeypatch.setattr(Figure, "savefig", saved)
    folder, out = clip_folder(tmp_path / "clip", tokenizer=True), tmp_path / "out"
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["text_projection.weight"] *= -1  # so that nearness is above 0
    safetensors.numpy.save_file(tensors, file)
    report = run(capsys, val, out, "--guidance", "1,8,3", "--clip", folder)
    points = sorted(report["points"], key=lambda point: point["guidance"])
    assert shown["points"] == [[p["clip_score"], p["fd_proxy"]] for p in points]
    assert shown["labels"] == ["1", "3", "8"]
    assert "CLIP score" in shown["words"][0]
    assert all("FD-proxy-6" in said for said in shown["words"][1:])
    assert len({p["clip_score"] for p in points}) == 3
    assert all(p["fd_clip"] > 0 and len(p["clip_score_interval"]) == 2 for p in points)
    judge = clip.load(folder)
    network = features.of_clip(judge)
    drawn = [images.load_image(f) for f in sorted(out.glob("guidance-8/*_16.png"))]
    rows = network([np.asarray(picture) for picture in drawn], 8)
    texts = judge.texts([line["caption"] for line in lines(out)])
    by_hand = clip_score.scores(rows, texts, np.arange(6)).as_json()["clip_score"]
    assert points[2]["clip_score"] == pytest.approx(by_hand, abs=1e-3)
    row = list(csv.DictReader((out / "pareto.csv").open()))[1]
    assert float(row["clip_score"]) == points[2]["clip_score"]


def other_captions(val, out):
    path = out.parent / "other.json"
    path.write_text((val / "val2014.json").read_text() + "\n")
    return ["--", str(path)]


def edited_draw(val, out):
    told = (out / "captions.jsonl").read_text().splitlines(keepends=True)
    (out / "captions.jsonl").write_text("".join([told[1], told[0], *told[2:]]))
    return []


@pytest.mark.parametrize(
    "change,message",
    [
        (["--seed", 1], "seed was 0 and is 1 now"),
        (["--prompts", 7], "prompts was 6 and is 7 now"),
        (["--steps", "2,3"], "settings.sr16.steps was 2 and is 3 now"),
        (["--until", "8", "--side", "8"], "until was 16 and is 8 now"),
        (other_captions, "captions.sha256 was"),
        (edited_draw, "draw_sha256 was"),
        ("model", 'model_sha256 was "abc" and is "abd" now'),
    ],
)
def test_another_run_is_refused_with_what_differs(
    loaded, val, whole, tmp_path, monkeypatch, change, message
):
    out = shutil.copytree(whole, tmp_path / "out")
    argv = words(val, out)
    if change == "model":
        monkeypatch.setattr(loaded, "digest", "abd")
    elif callable(change):
        more = change(val, out)
        argv[1] = more[1] if more else argv[1]
    else:
        argv = words(val, out, *change)
    before = contents(out)
    with pytest.raises(UserError) as e:
        evaluate.main(argv)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert contents(out) == before


def test_a_published_draw_is_drawn_anew(loaded, val, tmp_path, capsys):
    """Another one than this seed's, as another program may have made it."""
    out, captions = tmp_path / "out", coco.read(val / "val2014.json")
    out.mkdir()
    chosen = [
        {**dict(zip(NAMES, (a.id, a.image_id, a.caption), strict=True)), "seed": 1000 * i}
        for i, a in enumerate(captions.annotations[5:11])
    ]

    def put(rows):
        (out / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for wrong, said in (
        (chosen[:5], "has 5 captions, and --prompts is 6"),
        ([*chosen[:5], chosen[0] | {"seed": 5000}], "is drawn twice"),
        ([*chosen[:5], chosen[5] | {"seed": 1}], "line 6: by the file of captions and --seed 0"),
        ([*chosen[:5], chosen[5] | {"caption": "x"}], "it must be"),
        ([*chosen[:5], chosen[5] | {"annotation_id": 999}], "is no annotation of the file"),
        ([{"prompt": "x"}], "--prompt-column caption"),
    ):
        put(wrong)
        with pytest.raises(UserError, match=said):
            run(capsys, val, out)
        assert not (out / "run.json").exists() and not (out / "guidance-1").exists()
    put(chosen)
    run(capsys, val, out)
    about = [json.loads((out / "guidance-1" / f"{i:04d}.json").read_text()) for i in range(6)]
    assert [a["prompt"] for a in about] == [line["caption"] for line in chosen] and lines(
        out
    ) == chosen


NAMES = ("annotation_id", "image_id", "caption")


def test_statistics_stand_for_the_true_pictures(loaded, val, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "true.npz"
    report = run(capsys, val, tmp_path / "a", "--save-statistics", kept)
    by_file = run(capsys, val, tmp_path / "b", "--reference", kept)
    one, other = report["points"][0], by_file["points"][0]
    assert other["fd_proxy"] == pytest.approx(one["fd_proxy"])
    assert other["precision"] is None and by_file["reference"]["pictures"] == COUNT
    monkeypatch.setattr(loaded, "draw", None)  # refused before anything is drawn
    network = dataclasses.replace(features.of_random(), name="inception", suffix="")
    monkeypatch.setattr(features, "of_inception", lambda *a: network)
    argv = words(val, tmp_path / "c", "--reference", kept, "--network", "inception", "--weights")
    with pytest.raises(
        UserError, match=r"are of 120 features of \(random, .*, and these are 120 of \(inception"
    ):
        evaluate.main([*argv[:-1], "w", argv[-1]])
    assert not (tmp_path / "c").exists()


def test_the_name_has_the_number_and_notes_tell_what_cannot_be_compared():
    names = [coco_report.name_of("", count) for count in (30_000, 1000, 500)]
    assert names == ["FID-30K", "FID-1K", "FID-500"] and coco_report.name_of("_proxy", 40) == (
        "FD-proxy-40"
    )
    point = {"name": "FID-30K", "pictures": 30_000}
    report = {"points": [point], "reference": {"pictures": 40_504}, "side": 256, "network": "i"}
    assert coco.notes(report, "") == []
    fewer = coco.notes(report | {"points": [{"name": "FID-1K", "pictures": 1000}]}, "")
    assert len(fewer) == 1 and "FID-1K is of 1000 pictures, and falls with more" in fewer[0]
    assert len(coco.notes(report | {"side": 64}, "")) == 1
    assert len(coco.notes(report | {"reference": {"pictures": None}}, "")) == 1
    assert "is not FID" in coco.notes(report, "_proxy")[0]


def share(argv, printed):
    own = f"{printed}_{os.environ['JAX_PROCESS_ID']}"
    with open(own, "w") as out, contextlib.redirect_stdout(out):
        evaluate.main(argv)


def test_several_processes_share_the_work_and_the_first_tells(val, tmp_path, capsys):
    model = model_folders.model_folder(tmp_path / "model", testing.smallest_stage(128))
    more = ["--model", model, "--side", 8]
    expected = run(capsys, val, tmp_path / "alone", *more, prompts=5)
    argv, printed = words(val, tmp_path / "out", *more, prompts=5), str(tmp_path / "printed")
    group = processes.start_group(2, share, argv, printed)
    assert processes.codes(group) == [0, 0]
    told, silence = (Path(f"{printed}_{i}").read_text() for i in range(2))
    report = json.loads(told)
    assert silence == "" and report["draw_sha256"] == expected["draw_sha256"]
    for one, other in zip(report["points"], expected["points"], strict=True):
        assert one["fd_proxy"] == pytest.approx(other["fd_proxy"], rel=1e-2)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "alone").keys()


ONE = {"id": 1, "file_name": "a.jpg"}
SAID = {"id": 2, "image_id": 1, "caption": "x"}


@pytest.mark.parametrize(
    "value,said",
    [
        ('{"images": [{"id": 1', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        (b"\xff\xfe{", "not readable as JSON"),
        ([], "has no list 'images'; give captions_val2014.json"),
        ({"images": [ONE]}, "has no list 'annotations'"),
        ({"images": [3], "annotations": []}, "images[0].id must be a whole number, got null"),
        ({"images": [ONE], "annotations": []}, "has no caption"),
        ({"images": [ONE, ONE], "annotations": []}, "two images have the id 1"),
        ({"images": [ONE], "annotations": [SAID, SAID]}, "two annotations have the id 2"),
        ({"images": [ONE], "annotations": [SAID | {"image_id": 3}]}, "is about image 3, which"),
        ({"images": [ONE], "annotations": [SAID | {"id": True}]}, "annotations[0].id must be"),
        ({"images": [ONE], "annotations": [SAID | {"caption": "\ud800"}]}, "must be a text"),
        ({"images": [ONE], "annotations": [SAID | {"caption": "a\0b"}]}, "must be a text"),
        ({"images": [ONE], "annotations": [{"id": 3, "image_id": 1, "bbox": []}]}, "got null"),
    ],
)
def test_files_that_are_none_of_captions_are_told_in_a_line(tmp_path, value, said):
    file = tmp_path / "captions.json"
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e:
        coco.read(file)
    assert said in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 700


@pytest.mark.parametrize(
    "more,said",
    [
        (["--prompts", "25"], "--prompts 25: .* has 24 captions"),
        (["--prompts", "1"], "--prompts must be 2 or more"),
        (["--pictures", "none"], "no such folder. captions_val2014.json is in annotations_train"),
        (["--side", "32"], "--side 32: pictures are drawn at 16 px at most; give --side 16"),
        (["--until", "8"], "--side 16: pictures are drawn at 8 px at most; give --side 8"),
        (["--guidance", "1,x"], "--guidance 1,x: must be numbers with commas"),
        (["--guidance", "1,-2"], "--guidance 1,-2: weights must be in 0"),
        (["--guidance", "2,2.0"], "two weights are of guidance-2"),
        (["--reference", "r.npz", "--pictures", "p"], "or their statistics by --reference FILE"),
        (["--network", "inception"], "--weights FILE is missing"),
        (["--seed", "4294967295"], "--seed 4294967295: must be 0 or more, and the last"),
        (["--batch", "5000"], "--batch 5000"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(loaded, val, tmp_path, more, said):
    with pytest.raises(UserError, match=said) as e:
        evaluate.main(words(val, tmp_path / "out", *more))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_missing_pictures_and_files_of_others_are_told_before_anything_is_drawn(
    loaded, val, tmp_path
):
    with pytest.raises(UserError, match=r"none.json: no such file. .*cocodataset.org/#download"):
        coco.read(tmp_path / "none.json")
    own = write_coco(tmp_path / "own")
    (own / "val2014" / f"COCO_val2014_{7:012d}.png").unlink()
    with pytest.raises(UserError, match=r"holds 11 of the 12 pictures .*_000000000007.png' is not"):
        evaluate.main(words(own, tmp_path / "out"))
    value = json.loads((own / "val2014.json").read_text())
    value["images"][4]["file_name"] = "../val2014.json"
    (own / "val2014.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"'../val2014.json' is not there"):
        evaluate.main(words(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine, and no run.json of `cascade eval coco`"):
        evaluate.main(words(val, tmp_path / "out"))
    assert contents(tmp_path / "out") == {"mine": b"mine"}
