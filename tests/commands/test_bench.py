import json

import jax
import pytest
from written import records, tar

from cascade import config
from cascade.commands import bench
from cascade.commands.bench import CompileOptions, TrainOptions
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.stage import Stage
from cascade.training.embed import EmbedOptions, embed

SMALL = """
from cascade.models import Level, UNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels, StageConfig
from cascade.training.stage_training import StageTraining

def config():
    network = UNetConfig(levels=(Level(width=8, blocks=1),), head_width=8)
    stage = StageConfig(name="base8", space=Pixels(resolution=8), network=network)
    return StageTraining(stage=stage, data=ScenesData(), images=8, batch_size=8)
"""


def test_training_speed_is_measured_on_any_config(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(SMALL)
    got = bench.bench_train(config.load(str(file)), TrainOptions(steps=2, tokens=4))
    assert got["images_per_second"] == pytest.approx(8 / got["step_seconds"], rel=0.1)
    abstract = Stage(config.load(str(file)).stage).abstract()
    assert got["parameters"] == sum(x.size for x in jax.tree.leaves(abstract))
    assert got["tflops_per_device"] > 0 and got["mfu"] is None and got["devices"] == 8
    with pytest.raises(UserError, match="must be a multiple of the 8 parts"):
        bench.main(["train", "--config", str(file), "--batch-size", "4"])


def test_compiling_is_timed_without_parameters_or_steps(tmp_path, monkeypatch):
    file = tmp_path / "small.py"
    file.write_text(SMALL)

    init = Stage.init

    def traced(stage, key):
        assert isinstance(key, jax.core.Tracer), "made parameters"
        return init(stage, key)

    monkeypatch.setattr(Stage, "init", traced)
    got = bench.bench_compile(config.load(str(file)), CompileOptions())
    assert got["hlo_bytes"] > 10_000 and got["hlo_bytes_compiled"] > 10_000
    assert min(got[f"{name}_seconds"] for name in ("lower", "compile", "cpu")) > 0
    abstract = Stage(config.load(str(file)).stage).abstract()
    assert got["parameters"] == sum(x.size for x in jax.tree.leaves(abstract))
    with pytest.raises(UserError, match="--tokens must be 1 or more"):
        bench.bench_compile(config.load(str(file)), CompileOptions(tokens=0))


def test_a_config_gets_its_arguments_and_overrides_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "of_width.py"
    file.write_text(
        SMALL.replace("config()", "config(width: str)").replace("width=8,", "width=int(width),")
    )
    words = ["train", "--config", str(file), "--steps", "1", "--tokens", "4"]
    bench.main([*words, "--width", "16", "--batch-size=16"])
    settings, _ = config.load_with(str(file), ["--width", "16"])
    abstract = Stage(settings.stage).abstract()
    parameters = sum(x.size for x in jax.tree.leaves(abstract))
    got = json.loads(capsys.readouterr().out)
    assert got["parameters"] == parameters and got["batch_size"] == 16
    with pytest.raises(UserError, match="did you mean --batch-size"):
        bench.main([*words, "--width", "16", "--batch-sise", "16"])
    with pytest.raises(UserError, match="--width is missing"):
        bench.main(words)
    with pytest.raises(UserError, match="--config is missing"):
        bench.main(["train", "--steps", "1"])
    file.write_text("def config():\n    return None\n")
    with pytest.raises(UserError, match="must return a job, such as a StageTraining"):
        bench.main(["train", "--config", str(file)])


def test_whatever_learns_can_be_timed():
    encoder = T5Config(vocab_size=460, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    job = TextPretraining(encoder=encoder, images=8, batch_size=8)
    got = bench.bench_train(job, TrainOptions(steps=1, tokens=4))
    shapes = jax.eval_shape(job.fresh, jax.random.key(0))
    assert got["parameters"] == sum(x.size for x in jax.tree.leaves(shapes))
    assert got["stage"] == "text encoder" and got["images_per_second"] > 0


def test_reads_of_a_store_are_counted_against_padded_float16(tmp_path, capsys):
    """Of a store of the encoder that ships, of captions of 10 scenes."""
    out = str(tmp_path / "s")
    options = EmbedOptions(source="scenes", out=out, count=10, text_tokens=64)
    made = embed(options, ScenesData())
    bench.main(["embeddings", out, "--reads", "200", "--tokens", "64"])
    got = json.loads(capsys.readouterr().out)
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.safetensors"))
    assert got["texts"] == 11 and got["bytes_per_text"] == pytest.approx(size / 11, abs=0.1)
    assert got["padded_bytes_per_text"] == 64 * 128 * 2 and got["reads_per_second"] > 0
    assert got["smaller"] == pytest.approx(64 * 128 * 2 * 11 / size, rel=0.01)
    assert got["lowest_cosine"] == made["lowest_cosine"] > 0.999
    bench.main(["embeddings", "--reads", "128"])
    assert json.loads(capsys.readouterr().out)["smaller"] > 12  # of COCO's lengths, 4096 wide
    with pytest.raises(UserError, match="reads=0: must be 1 or more"):
        bench.bench_embeddings(bench.EmbeddingsOptions(store=out, reads=0))
    with pytest.raises(UserError, match="no such folder"):
        bench.main(["embeddings", str(tmp_path / "none")])


def test_the_reading_of_a_dataset_is_measured(tmp_path, capsys):
    found = records(4)
    found[2] = ("002", b"no picture", "2", {})
    tar(tmp_path / "d", found)
    words = ["data", f"tar:{tmp_path}/d", "--resolution", "8", "--count", "40"]
    bench.main([*words, "--trainer", "1e-3"])
    told = json.loads(capsys.readouterr().out)
    assert told["examples"] == 4 and told["read"] + told["bad_records"] == 40
    assert 0 < told["bad_records"] < 40
    assert told["images_per_second_per_core"] > 0 and told["images_per_second_of_a_reader"] > 0
    assert told["trainer_waits"] is False
    bench.main([*words, "--trainer", "1e12"])
    assert json.loads(capsys.readouterr().out)["trainer_waits"] is True
    with pytest.raises(UserError, match="must be 1 or more"):
        bench.main(["data", f"tar:{tmp_path}/d", "--count", "0"])
    tar(tmp_path / "d", [("a", b"no picture", "a", {})])
    with pytest.raises(UserError, match="none of 40 examples can be read"):
        bench.main(["data", f"tar:{tmp_path}/d/00000.tar", *words[2:]])
