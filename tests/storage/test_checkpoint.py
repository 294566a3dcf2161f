import errno
import json
import os
import resource
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cascade.devices import distributed
from cascade.devices.sharding import MeshConfig, make_mesh
from cascade.errors import UserError
from cascade.storage import checkpoint
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.paths import WholeFolder


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def saved(workdir, steps=(1, 2)):
    """Checkpoints whose weights equal their step."""
    checkpoints = Checkpoints(workdir)
    for step in steps:
        tree = {"w": jnp.full((8, 8), float(step)), "n": jnp.int32(step)}
        checkpoints.save(step, train=tree, ema=tree, config={"step": step}, data={"at": step})
    checkpoints.close()
    return tree


def test_a_checkpoint_returns_on_another_mesh(tmp_path):
    tree = saved(tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    target = abstract({"w": tree["w"]}, NamedSharding(mesh, PartitionSpec("fsdp")))
    target["n"] = abstract(tree["n"], NamedSharding(mesh, PartitionSpec()))
    step, train, ema, data = Checkpoints(tmp_path).restore(train=target, ema=target)
    assert (step, data, int(train["n"])) == (2, {"at": 2}, 2)
    assert np.array_equal(ema["w"], np.full((8, 8), 2.0))
    assert train["w"].sharding.spec == PartitionSpec("fsdp")


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, train={"w": jnp.ones(2)}, ema={"w": jnp.ones(2)}, config={}, data={})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 3]


def damage(folder):
    """Cut every large file of a checkpoint in half, as a full disk would."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 0:
            os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    tree = saved(tmp_path)
    damage(tmp_path / "checkpoints" / "2")
    with pytest.warns(UserWarning, match="cannot be read"):
        step, _, ema, _ = Checkpoints(tmp_path).restore(train=abstract(tree), ema=abstract(tree))
    assert step == 1 and float(ema["w"][0, 0]) == 1.0


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_passed_over_a_damaged_checkpoint_saves_that_step_again(tmp_path):
    tree = saved(tmp_path)
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(train=abstract(tree), ema=abstract(tree))
    again = {"w": jnp.full((8, 8), 5.0), "n": jnp.int32(2)}
    checkpoints.save(2, train=again, ema=again, config={}, data={})
    checkpoints.close()
    step, ema, _ = Checkpoints(tmp_path).restore_ema()
    assert step == 2 and float(ema["w"][0, 0]) == 5.0
    assert (tmp_path / "checkpoints" / "2.damaged1").is_dir()


def halves(step):
    """Weights of which each of two processes has a half; noise, which does not pack small."""
    noise = np.random.default_rng(step).standard_normal((64, 64), np.float32)
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=2)), PartitionSpec("fsdp"))
    return {"w": jax.make_array_from_callback(noise.shape, sharding, lambda at: noise[at])}


def save_together(workdir):
    with distributed.processes():
        checkpoints = Checkpoints(workdir)
        for step in (1, 2):
            checkpoints.save(step, train=halves(step), ema=halves(step), config={}, data={})
        checkpoints.close()


def restore_together(workdir):
    warnings.simplefilter("ignore")
    with distributed.processes():
        checkpoints, tree = Checkpoints(workdir), halves(0)
        target = abstract(tree, tree["w"].sharding)
        step, train, ema, _ = checkpoints.restore(train=target, ema=target)
        (workdir / f"step_{jax.process_index()}").write_text(str(step))
        own = train["w"].addressable_data(0)
        assert np.array_equal(own, halves(step)["w"].addressable_data(0))
        checkpoints.save(2, train=train, ema=ema, config={}, data={})
        checkpoints.close()


def test_processes_pass_over_a_checkpoint_that_one_of_them_cannot_read(tmp_path):
    assert processes.codes(processes.start_group(2, save_together, tmp_path)) == [0, 0]
    damage(tmp_path / "checkpoints" / "2" / "train" / "ocdbt.process_1")
    assert processes.codes(processes.start_group(2, restore_together, tmp_path), 60) == [0, 0]
    assert [(tmp_path / f"step_{i}").read_text() for i in range(2)] == ["1", "1"]
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    tree = saved(tmp_path, steps=(1,))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp-7")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(train=abstract(tree), ema=abstract(tree))[0] == 1


# The second write that TensorStore was doing ends after Orbax has closed the loop of both.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path):
    tree = saved(tmp_path, steps=(1,))
    noise = {"w": jax.random.normal(jax.random.key(0), (512, 512)), "n": jnp.int32(2)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    # Files may not outgrow 100 kB: the system refuses to write, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written \(File too large\).*steps 1\)"):
            checkpoints.save(2, train=noise, ema=noise, config={}, data={})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    step, _, ema, _ = checkpoints.restore(train=abstract(tree), ema=abstract(tree))
    assert step == 1 and float(ema["w"][0, 0]) == 1.0
    checkpoints.save(2, train=noise, ema=noise, config={}, data={})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_no_readable_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    saved(tmp_path, steps=(1,))
    damage(tmp_path / "checkpoints" / "1")
    with pytest.raises(UserError, match="no readable checkpoint"):
        Checkpoints(tmp_path).restore_ema()


@pytest.mark.parametrize("dtype,tolerance", [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_safetensors_round_trip(tmp_path, dtype, tolerance):
    params = {"levels": {"0": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}}}
    path = tmp_path / "model.safetensors"
    checkpoint.save_safetensors(path, params, dtype=dtype)
    back = checkpoint.load_safetensors(path, abstract(params))
    got = back["levels"]["0"]["kernel"]
    assert got.dtype == np.float32
    assert np.abs(got - params["levels"]["0"]["kernel"]).max() <= tolerance


@pytest.mark.parametrize(
    "expected,message",
    [
        ({"a": (2,), "b": (1,)}, "missing b"),
        ({}, "left over a"),
        ({"a": (3,)}, r"a has shape \(2,\), expected \(3,\)"),
    ],
)
def test_loading_is_total(tmp_path, expected, message):
    path = tmp_path / "model.safetensors"
    checkpoint.save_safetensors(path, {"a": np.zeros(2, np.float32)})
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in expected.items()}
    with pytest.raises(UserError, match=message):
        checkpoint.load_safetensors(path, shapes)


def test_a_truncated_weights_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_safetensors(path, {"a": np.zeros(200, np.float32)})
    os.truncate(path, 100)
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        checkpoint.load_safetensors(path, {"a": jax.ShapeDtypeStruct((200,), jnp.float32)})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), WholeFolder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with WholeFolder(tmp_path / "out") as folder:
        (folder / "all").write_text(json.dumps({}))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["all"]
    with pytest.raises(UserError, match="exists already"), WholeFolder(tmp_path / "out"):
        pass
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "mount", "."])
def test_an_empty_folder_that_cannot_be_removed_is_filled(tmp_path, monkeypatch, kind):
    """With what a killed run has left in it, which does not count."""
    (tmp_path / "empty" / ".partial-killed").mkdir(parents=True)
    out = tmp_path / "empty"
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "empty")
    elif kind == "mount":
        move = os.replace

        def busy(source, target):
            if target == out:
                raise OSError(errno.EBUSY, "Device or resource busy")
            move(source, target)

        monkeypatch.setattr(os, "replace", busy)
    else:
        monkeypatch.chdir(out)
        out = "."
    with WholeFolder(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text("all")
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "empty" / "config.json").exists()
    made = {p.name for p in (tmp_path / "empty").iterdir()}
    assert made == {"part", "config.json", ".partial-killed"}
    assert (tmp_path / "empty" / "part" / "weights").read_text() == "all"
    with pytest.raises(UserError, match="exists already"), WholeFolder(out):
        pass


def test_what_cannot_be_moved_into_place_is_kept_and_named(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="not empty any more.*left in") as said:
        with WholeFolder(tmp_path / "out") as folder:
            (folder / "mine").write_text("x")
            (tmp_path / "out" / "mine").write_text("of another process")
    (kept,) = (tmp_path / "out").glob(".partial-*")
    assert (kept / "mine").read_text() == "x" and str(kept) in str(said.value)
    assert (tmp_path / "out" / "mine").read_text() == "of another process"
