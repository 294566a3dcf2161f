import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import storage
from etils import epath

from cascade import images, testing
from cascade.commands import data as commands
from cascade.commands import eval as evaluate
from cascade.commands import export, sample
from cascade.config import to_json
from cascade.data import FolderData, TFDSData
from cascade.data.inspection import inspect
from cascade.errors import UserError
from cascade.evaluation import super_resolution
from cascade.models.t5 import T5Config
from cascade.runner.model_folder import open_model
from cascade.scenes.captions import caption_at
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.storage import lock, paths
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.lock import Lock
from cascade.storage.paths import WholeFolder, write_json
from cascade.storage.weights import load_safetensors, save_safetensors
from cascade.training import loop as train
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that is gs://bucket."""
    paths._check_bucket.cache_clear()
    with storage.served(tmp_path, monkeypatch):
        (tmp_path / "bucket").mkdir()
        yield tmp_path / "bucket"
    paths._check_bucket.cache_clear()


CONFIG = StageTraining(
    stage=testing.smallest_stage(text_width=128),
    data=ScenesData(split="train"),
    images=16,
    batch_size=8,
    optimizer=Optimizer(learning_rate=1e-3),
    log_every_images=8,
    save_every_images=8,
    preview_every_images=0,
)


def losses(text):
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_a_run_lives_in_object_storage_as_it_does_here(bucket, tmp_path, monkeypatch):
    """Trains, resumes, is exported, and draws, with no file of it here."""
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: alone)  # for less to compile
    train.fit(CONFIG, tmp_path / "here")
    train.fit(CONFIG, "gs://bucket/run", until=8)
    train.fit(CONFIG, "gs://bucket/run")
    names = {p.name for p in (bucket / "run").iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "loss.png", "tensorboard"}
    assert len(list((bucket / "run" / "tensorboard").iterdir())) == 2
    there = losses((bucket / "run" / "metrics.jsonl").read_text())
    assert there == losses((tmp_path / "here" / "metrics.jsonl").read_text())

    report = export.export(["gs://bucket/run"], "gs://bucket/model")
    export.export([tmp_path / "here"], tmp_path / "model")
    assert report["trained"]["base8"]["images"] == 16
    files = {
        name: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name, folder in (("there", bucket / "model"), ("here", tmp_path / "model"))
    }
    assert files["there"] == files["here"] and "base8/model.safetensors" in files["there"]
    with pytest.raises(UserError, match="exists already"):
        export.export(["gs://bucket/run"], "gs://bucket/model")

    words = ["a red circle", "--steps", "2", "--no-compilation-cache"]
    there = ["--model", "gs://bucket/model", "--out", "gs://bucket/pictures"]
    sample.main([*words, *there])
    sample.main([*words, *there])
    drawn = {p.name: p.read_bytes() for p in (bucket / "pictures").iterdir()}
    assert set(drawn) == {f"000{i}{end}" for i in (0, 1) for end in ("_8.png", ".json")}
    assert drawn["0001_8.png"] == drawn["0000_8.png"]


def test_a_profile_is_copied_to_object_storage(bucket, monkeypatch):
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", folders.append)
    monkeypatch.setattr(
        jax.profiler, "stop_trace", lambda: (pathlib.Path(folders[0]) / "trace").write_text("all")
    )
    with train._Profile(paths.path("gs://bucket/run/profile"), 1) as profile:
        for _ in range(5):
            profile.before_step()
    assert (bucket / "run" / "profile" / "trace").read_text() == "all" and len(folders) == 1


def test_pictures_and_captions_are_read_from_object_storage(bucket):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images.save_png("gs://bucket/data/a/1.png", picture)
    with pytest.raises(UserError, match="must hold captions.jsonl"):
        FolderData(path="gs://bucket/data").open(8)
    line = json.dumps({"file": "a/1.png", "caption": "a red circle"})
    (bucket / "data" / "captions.jsonl").write_text(line)
    source = FolderData(path="gs://bucket/data").open(8)
    assert len(source) == 1 and source[0]["caption"] == "a red circle"
    assert np.array_equal(source[0]["image"], picture)
    with pytest.raises(UserError, match="gs://bucket/data/2.png: no such file"):
        images.load_image("gs://bucket/data/2.png")


def test_scenes_are_made_in_object_storage_and_read_from_it(bucket, capsys):
    words = ["gs://bucket/made", "--count", "2", "--resolution", "8", "--split", "unseen"]
    commands.main(["make", *words])
    report = json.loads(capsys.readouterr().out)
    written = [p for p in (bucket / "made").rglob("*") if p.is_file()]
    assert sorted(report["files"]) == sorted(str(p.relative_to(bucket / "made")) for p in written)
    assert report["bytes"] == sum(p.stat().st_size for p in written)
    source = TFDSData(name="scenes", data_dir=report["data_dir"], split="unseen").open(8)
    for index in range(2):
        assert source[index]["caption"] == caption_at(0, index, "unseen")[1].text
    commands.main(["inspect", report["data_dir"], *words[-2:], "--out", "gs://bucket/sheet.png"])
    assert json.loads(capsys.readouterr().out)["sheet"] == "gs://bucket/sheet.png"
    assert images.load_image("gs://bucket/sheet.png").size > (100, 100)
    with pytest.raises(UserError, match="exists already"):
        inspect(ScenesData(), pathlib.Path("gs://bucket/sheet.png"))
    with pytest.raises(UserError, match="gs://bucket/none.*not found"):
        TFDSData(name="scenes", data_dir="gs://bucket/none").open(8)


def test_a_report_is_written_to_object_storage(bucket, monkeypatch, capsys):
    def evaluated(drawer, folder, **_):
        images.save_png(folder / "sr.png", np.zeros((2, 2, 3), np.uint8))
        return {}

    monkeypatch.setattr(super_resolution, "evaluate_super_resolution", evaluated)
    drawer = types.SimpleNamespace(settings={})
    monkeypatch.setattr(evaluate.scenes, "drawer_of", lambda *_, **__: drawer)
    monkeypatch.setattr(evaluate.scenes, "described", lambda *_: {"model": "none"})
    evaluate.main(["sr", "--out", "gs://bucket/report", "--pictures", "2"])
    report = json.loads((bucket / "report" / "results.json").read_text())
    assert report == json.loads(capsys.readouterr().out) and (bucket / "report" / "sr.png").exists()


def test_a_text_encoder_is_trained_in_object_storage_as_it_is_here(bucket, tmp_path, monkeypatch):
    """Stopped and resumed there, with the files and the rows of a run here."""
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: alone)

    def step(state, batch):  # quicker to compile than the real one
        run, figures = state["train"], ("loss", "grad_norm", "update_norm", "param_norm")
        params = jax.tree.map(lambda x: 0.9 * x, run["params"])
        run = {**run, "params": params, "step": run["step"] + 1}
        metrics = dict.fromkeys(figures, batch["inputs"].mean()) | {"skipped": jnp.array(False)}
        return {**state, "train": run, "ema": params}, metrics

    monkeypatch.setattr(train, "make_train_step", lambda *_: step)
    encoder = T5Config(vocab_size=460, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config = TextPretraining(
        encoder=encoder,
        images=16,
        batch_size=4,
        length=8,
        vocabulary_captions=50,
        log_every_images=4,
        preview_every_images=0,
    )
    train.fit(config, tmp_path / "here")
    train.fit(config, "gs://bucket/run", until=8)
    train.fit(config, "gs://bucket/run")
    names = {p.name for p in (bucket / "run").iterdir()}
    assert names == {p.name for p in (tmp_path / "here").iterdir()}
    files = {
        str(p.relative_to(tmp_path / "here"))
        for p in [tmp_path / "here" / "spiece.model", *(tmp_path / "here").glob("text_encoder/*")]
    }
    for name in files:
        assert (bucket / "run" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    ends = [Checkpoints(run).restore_ema() for run in ("gs://bucket/run", tmp_path / "here")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    there = losses((bucket / "run" / "metrics.jsonl").read_text())
    assert there == losses((tmp_path / "here" / "metrics.jsonl").read_text())
    assert "text_encoder/model.safetensors" in files and (bucket / "run" / "loss.png").exists()


@pytest.mark.parametrize("where", ["gs://bucket", "here"])
def test_files_and_folders_appear_whole_or_not_at_all(bucket, tmp_path, where):
    root = paths.path(where if where != "here" else tmp_path / "here")
    root.mkdir(exist_ok=True)
    with pytest.raises(RuntimeError), paths.writing(root / "file") as file:
        file.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), WholeFolder(root / "folder") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(root.iterdir()) == []
    save_safetensors(root / "file", {"w": np.ones(3, np.float32)})
    abstract = {"w": np.zeros(3, np.float32)}
    assert np.array_equal(load_safetensors(root / "file", abstract)["w"], np.ones(3))
    with WholeFolder(root / "folder") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text("all")
    assert (root / "folder" / "part" / "weights").read_text() == "all"
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []


def test_a_folder_is_described_in_object_storage_once_all_else_is_there(bucket, tmp_path):
    names = ("a/1.record", "a/dataset_info.json", "a/features.json", "a/z.record", "b/c/w")
    names += ("config.json", "model.safetensors", "z.json")
    for name in names:
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(name)
    paths.copy_folder(tmp_path / "made", paths.path("gs://bucket/made"))
    written = sorted((bucket / "made" / name for name in names), key=lambda p: p.stat().st_mtime_ns)
    assert [str(p.relative_to(bucket / "made")) for p in written] == [
        *("b/c/w", "a/1.record", "a/z.record", "a/dataset_info.json", "a/features.json"),
        *("model.safetensors", "z.json", "config.json"),
    ]


def test_a_model_of_object_storage_is_copied_once_and_its_text_encoder_named_there(
    bucket, monkeypatch
):
    copies, copy = [], paths.local_copy
    monkeypatch.setattr(paths, "local_copy", lambda folder: copies.append(folder) or copy(folder))
    (bucket / "model" / "base8").mkdir(parents=True)
    stage = testing.smallest_stage()
    write_json(bucket / "model" / "base8" / "config.json", to_json(stage))
    write_json(bucket / "model" / "config.json", {"format": "cascade", "stages": ["base8"]})
    model = open_model("gs://bucket/model")
    assert model.stages == [stage] and model.max_tokens > 0 and model.captions == "verbatim"
    assert model.text_encoder == "gs://bucket/model/text_encoder"
    assert len(copies) == 1


def test_names_of_object_storage_survive_pathlib(bucket, tmp_path):
    assert paths.path("gs://bucket/a/b") == epath.Path("gs://bucket/a/b")
    folded = paths.path(pathlib.Path("gs://bucket/a/b"))
    assert str(folded) == "gs://bucket/a/b" and paths.is_remote(folded)
    assert paths.path(tmp_path) == tmp_path and not paths.is_remote(paths.path("gs"))


@pytest.mark.parametrize("name", ["http://there/run", "https:/there/run", "gcs://bucket/run"])
def test_other_storage_is_refused_and_no_folder_of_its_name_is_made(name):
    with pytest.raises(UserError, match=r"is not understood; only gs:// and s3:// are"):
        paths.path(name)


def test_storage_without_its_client_is_one_line(monkeypatch):
    kind = type(storage.backend.fsspec_backend)

    def missing(self, name):
        raise ImportError(f"no module for {name}")

    monkeypatch.setattr(kind, "_get_filesystem", missing)
    paths._check_bucket.cache_clear()
    with pytest.raises(UserError, match=r"s3://there: needs s3fs; pip install .*storage"):
        train.fit(CONFIG, "s3://there/run")


def test_in_object_storage_the_second_is_refused_too(bucket):
    folder = paths.path("gs://bucket/run")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder), pytest.raises(UserError, match="a training holds this folder"):
        Lock(folder).__enter__()
    assert not (folder / lock.NAME).exists()
