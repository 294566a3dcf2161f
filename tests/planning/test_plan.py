import dataclasses
import functools
import json
import math
import os
import sys
import threading

import jax
import pytest
from jax.experimental import topologies

from cascade import testing
from cascade.cli import main
from cascade.devices import xla_flags
from cascade.devices.chips import chip_named
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.planning import compiled, sampling, search
from cascade.planning.figures import figures, table
from cascade.planning.sampling import plan_sampling
from cascade.planning.search import suggest
from cascade.planning.topology import Topology, open_topology, run_mesh
from cascade.planning.training import plan_training
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.stage import Stage
from cascade.training.stage_training import StageTraining

TOKENS = 12
BATCH_BYTES = 8 * 8 * 3 + TOKENS * 8 * 4 + TOKENS  # of one picture, its text and its mask


def config_of(remat=False, **changes):
    stage = testing.smallest_stage()
    network = dataclasses.replace(stage.network, remat=remat)
    stage = dataclasses.replace(stage, network=network)
    fields = {"stage": stage, "data": ScenesData(), "images": 64, "batch_size": 16}
    return StageTraining(**fields | changes)


def config_file(folder):
    """config_of() as a file."""
    file = folder / "config.py"
    file.write_text(
        "from cascade import testing\nfrom cascade.scenes.dataset import ScenesData\n"
        "from cascade.training.stage_training import StageTraining\n"
        "def config():\n"
        "    return StageTraining(stage=testing.smallest_stage(), data=ScenesData(), images=64,\n"
        "                         batch_size=16)\n"
    )
    return str(file)


def parameters():
    leaves = jax.tree.leaves(Stage(testing.smallest_stage()).abstract())
    return sum(math.prod(leaf.shape) for leaf in leaves)


@functools.cache
def planned(count=8, fsdp=1, microbatches=1, remat=False):
    config = config_of(remat, microbatches=microbatches, mesh=MeshConfig(fsdp=fsdp))
    return plan_training(config, gpus(count), tokens=TOKENS)


def gpus(count, **changes):
    chip = chip_named("h100")
    return Topology("h100", dataclasses.replace(chip, **changes), count, None)


# GPUs: from shapes


def test_memory_of_replicated_training_is_four_numbers_for_each_parameter_and_the_batch():
    """Parameters, their average, Adam's two moments; then the step, counted in three places."""
    got = planned()
    assert got["parameters"] == parameters()
    assert got["argument_bytes"] == 4 * 4 * parameters() + 3 * 4 + BATCH_BYTES * 16 / 8
    # Gradients, and more for the activations that are kept.
    assert got["temporary_bytes"] > 4 * parameters()
    assert got["peak_bytes"] == got["argument_bytes"] + got["temporary_bytes"]
    sent = {kind: c["sent_bytes"] for kind, c in got["collectives"].items()}
    assert sent == {"all-reduce": 2 * 4 * parameters() * 7 / 8}
    days = got["bound_seconds"] * 2.5e6 / 86400
    assert math.isclose(got["paper_days"], days)
    assert math.isclose(got["paper_chip_hours"], days * 24 * 8)


def test_fsdp_splits_memory_and_gathers_parameters():
    whole, split = planned(), planned(fsdp=8, microbatches=2)
    assert split["argument_bytes"] < 0.5 * whole["argument_bytes"]
    sent = {kind: c["sent_bytes"] for kind, c in split["collectives"].items()}
    piece = 4 * parameters() * 7 / 8
    assert sent == {"all-gather": 2 * 2 * piece, "reduce-scatter": 2 * piece}


def test_remat_keeps_less_and_computes_more_of_which_mfu_counts_none():
    kept, again = planned(), planned(remat="nothing_saveable")
    assert again["temporary_bytes"] < kept["temporary_bytes"]
    assert again["flops"] > kept["flops"] == kept["model_flops"] == again["model_flops"]
    peak = 8 * chip_named("h100").flops
    assert math.isclose(again["mfu"], kept["model_flops"] / peak / again["bound_seconds"])


@pytest.mark.parametrize(
    "slow,by", [("flops", "compute"), ("hbm_bandwidth", "memory"), ("interconnect", "interconnect")]
)
def test_the_slowest_of_three_binds(slow, by):
    measured = {
        "hbm_traffic_bytes": 1e6,
        "collectives": {"all-reduce": {"count": 1, "sent_bytes": 1e6}},
    }
    config, topology = config_of(), gpus(8, **{slow: 1e3})
    got = figures(
        *(config.stage.name, topology, run_mesh(config, topology), {}, measured),
        **{"model": 1e6, "executed": 1e6, "images": 16},
    )
    assert got["compute_seconds"] == 1e6 / 8 / topology.chip.flops
    assert got["memory_seconds"] == 1e6 / topology.chip.hbm_bandwidth
    assert got["interconnect_seconds"] == 1e6 / topology.chip.interconnect
    assert got["bound_by"] == by
    assert got["bound_seconds"] == got[f"{by}_seconds"]
    assert math.isclose(got["images_per_second"] * got["bound_seconds"], 16)


def test_suggest_names_settings_that_fit_where_the_configs_do_not():
    config, plain = config_of(), planned(16)
    tight = gpus(16, hbm=0.5 * (plain["argument_bytes"] + 4 * parameters()))
    got = suggest(config, tight, tokens=TOKENS)
    assert plain["peak_bytes"] > tight.chip.hbm
    assert got["fits"] is True and got["settings"]["mesh.fsdp"] in (4, 16)
    assert got["bound_seconds"] == min(t["bound_seconds"] for t in got["tried"])
    with pytest.raises(UserError, match="nothing that was tried fits"):
        suggest(config, gpus(16, hbm=1e3), tokens=TOKENS)


def test_suggest_also_tries_the_tensor_axis_where_a_compiler_can_tell_what_it_sends(monkeypatch):
    meshes = []

    def planned(config, topology, *, tokens):
        meshes.append(config.mesh)
        bound = 1.0 if config.mesh == MeshConfig(fsdp=4, tensor=2) else 2.0
        return {"fits": True, "peak_bytes": 1.0, "bound_seconds": bound}

    monkeypatch.setattr(search, "plan_training", planned)
    simulated = Topology("simulated", chip_named("v5e"), 8, jax.devices())
    got = suggest(config_of(), simulated, tokens=TOKENS)
    assert (got["settings"]["mesh.fsdp"], got["settings"]["mesh.tensor"]) == (4, 2)
    assert len(got["tried"]) == len(meshes) == 6
    meshes.clear()
    suggest(config_of(), gpus(8), tokens=TOKENS)
    assert {mesh.tensor for mesh in meshes} == {1}


def test_a_tpu_is_planned_with_the_flags_that_training_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", object())
    monkeypatch.setattr(os, "environ", {"LIBTPU_INIT_ARGS": "--mine=1"})
    # libtpu reads them when it is loaded, which is here.
    monkeypatch.setattr(
        topologies, "get_topology_desc", lambda **_: pytest.fail(os.environ["LIBTPU_INIT_ARGS"])
    )
    with pytest.raises(pytest.fail.Exception, match="--mine=1 " + " ".join(xla_flags.TPU)):
        open_topology("v5e:2x2")


def test_any_job_can_be_planned_and_one_without_a_choice_of_remat_is_tried_once():
    encoder = T5Config(vocab_size=460, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    job = TextPretraining(encoder=encoder, images=64, batch_size=16)
    got = plan_training(job, gpus(8), tokens=TOKENS)
    shapes = jax.eval_shape(job.fresh, jax.random.key(0))
    assert got["parameters"] == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert got["stage"] == "text encoder" and got["flops"] == got["model_flops"] > 0
    settings = [str(t["settings"]) for t in suggest(job, gpus(8), tokens=TOKENS)["tried"]]
    assert len(set(settings)) == len(settings) and all("'remat': False" in s for s in settings)


# Compiled: simulated devices stand for those of a TPU slice


def test_a_compiled_step_has_the_arguments_of_its_shards_and_its_collectives():
    config = config_of(mesh=MeshConfig(fsdp=2))
    topology = Topology("simulated", chip_named("v5e"), 2, jax.devices()[:2])
    got, shapes = plan_training(config, topology, tokens=TOKENS), planned(2, fsdp=2)
    assert math.isclose(got["argument_bytes"], shapes["argument_bytes"], rel_tol=0.01)
    assert got["temporary_bytes"] > 0 and got["fits"] is True
    sent = sum(c["sent_bytes"] for c in got["collectives"].values())
    assert sent > 4 * parameters() / 2
    assert got["hbm_traffic_bytes"] > 2 * shapes["argument_bytes"]
    assert got["flops"] == shapes["flops"]
    assert "interconnect" in table(got)


def test_sampling_counts_every_step_of_both_guided_halves(monkeypatch):
    config = config_of(stage=testing.super_resolution_stage())
    topology = Topology("simulated", chip_named("v5e"), 2, jax.devices()[:2])
    got = plan_sampling(config, topology, tokens=TOKENS, batch_size=4)
    assert got["batch"] == 4 and got["mfu"] > 0 and "paper_days" not in got
    settings = dataclasses.replace(config.stage.sampling, steps=4, guidance=2.0)
    more = dataclasses.replace(config, stage=dataclasses.replace(config.stage, sampling=settings))
    measured = {"hbm_traffic_bytes": 0.0, "collectives": {}}
    monkeypatch.setattr(sampling, "compiled", lambda *_: measured)
    work = plan_sampling(more, topology, tokens=TOKENS, batch_size=4)["flops"]
    # Twice the steps, twice the network in each.
    assert math.isclose(work, 4 * got["flops"], rel_tol=0.01)


def test_sampling_by_rows_is_of_the_chips_that_share_the_pictures():
    """Each holds all weights and a part of what is between layers, and sends its edges."""
    config = config_of(stage=testing.super_resolution_stage())
    topology = Topology("simulated", chip_named("v5e"), 4, jax.devices()[:4])
    one = dataclasses.replace(topology, count=1, devices=jax.devices()[:1])
    plain = plan_sampling(config, one, tokens=TOKENS)
    shared = plan_sampling(config, topology, tokens=TOKENS, split_rows=2)
    assert (shared["mesh"], shared["chips"], shared["batch"]) == ({"rows": 2}, 2, 1)
    assert shared["argument_bytes"] == plain["argument_bytes"]
    assert shared["temporary_bytes"] < 0.8 * plain["temporary_bytes"]
    assert "collective-permute" in shared["collectives"] and not plain["collectives"]
    assert shared["compute_seconds"] == plain["compute_seconds"] / 2
    with pytest.raises(UserError, match="must divide the 16 rows"):
        plan_sampling(config, topology, tokens=TOKENS, split_rows=3)
    with pytest.raises(UserError, match="draws from text alone"):
        plan_sampling(config_of(), topology, tokens=TOKENS, split_rows=2)


def test_a_program_that_the_compiler_finds_too_large_does_not_fit():
    got = compiled.too_large(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G "
        "of 15.75G hbm. Exceeded hbm capacity by 2.75G."
    )
    assert got["fits"] is False and got["peak_bytes"] == 18.5 * 2**30
    with pytest.raises(UserError, match="refused"):
        compiled.too_large("INTERNAL: something else\nmore")


def test_a_step_compiles_for_a_tpu_slice_without_a_tpu(capsys, tmp_path):
    pytest.importorskip("libtpu")
    words = ["--topology", "v5e:2x2", "--tokens", str(TOKENS), "--mesh.fsdp", "4"]
    main(["plan", config_file(tmp_path), *words])
    got = json.loads(capsys.readouterr().out)
    assert (got["chips"], got["mesh"]) == (4, {"data": 1, "fsdp": 4, "tensor": 1})
    assert got["fits"] is True and got["hbm_traffic_bytes"] > 0 and got["collectives"]
    assert got["argument_bytes"] >= planned(4, fsdp=4)["argument_bytes"]  # tiles pad


# The command


def run(*words):
    main(["plan", "configs/tiny/base64.py", *words])


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "--topology is missing"),
        (["--topology", "v9:2x2"], "CHIP of v4, v5e"),
        (["--topology", "h100:8x"], "CHIP:SHAPE"),
        (["--topology", "h100:8", "--tokens", "x"], "--tokens"),
        (["--topology", "h100:8", "--sample"], "--sample needs a compiler"),
        (["--topology", "h100:8", "--sample", "--suggest"], "leave out"),
        (["--topology", "h100:3", "--suggest"], "must be a multiple of the 3 chips of h100:3"),
        (["--topology", "h100:8", "--sample-batch", "2"], "goes with --sample"),
        (["--topology", "h100:8", "--sample", "--sample-batch", "0"], "must be positive"),
        (["--topology", "h100:8", "--split-rows", "2"], "goes with --sample"),
        (["--topology", "h100:8", "--mesh.data", "3"], "found 8"),
        (["--topology", "h100:8", "--batch-size", "12"], "must be a multiple of"),
        (["--topology", "h100:8", "--batchsize", "12"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "file,words,message",
    [
        ("configs/scenes/text_encoder.py", ["--sample"], "--sample draws pictures, which only a"),
        ("none.py", [], "config() must return a job, such as a StageTraining"),
    ],
)
def test_what_cannot_be_planned_is_one_line(file, words, message, capsys, tmp_path):
    (tmp_path / "none.py").write_text("def config():\n    return None\n")
    file = tmp_path / file if file == "none.py" else file
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(file), "--topology", "h100:8", *words])
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_command_prints_a_table_and_json(capsys, tmp_path):
    words = ("--topology", "a100:8", "--mesh.fsdp", "8", "--tokens", str(TOKENS))
    main(["plan", config_file(tmp_path), *words])
    out, err = capsys.readouterr()
    got = json.loads(out)
    assert got["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and got["chips"] == 8
    assert "fits" in err and "not known" in err
    assert open_topology("a100:8").chip.hbm == got["hbm_bytes"]


def test_a_compiler_that_has_written_what_a_plan_reads_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE", 0.0)
    never = threading.Event()

    class Lowered:
        def compile(self, compiler_options):
            (tmp_path / "m.after_optimizations_after_buffer_assignment.txt").touch()
            never.wait()

    assert compiled.compile_until_written(Lowered(), {}, tmp_path) is None
    never.set()
