import errno
import os
import random
import resource
import shutil
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cascade.devices import distributed
from cascade.devices.sharding import MeshConfig, make_mesh
from cascade.errors import UserError
from cascade.storage import checkpoint, checksums
from cascade.storage.checkpoint import Checkpoints


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


def files_of(folder):
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]


def flip_a_bit(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed_and_its_file_is_named(tmp_path):
    tree = saved(tmp_path / "run")
    rng = random.Random(0)
    newest = tmp_path / "run" / "checkpoints" / "2"
    items = [f for f in files_of(newest) if f.parent != newest]
    assert len(items) > 12
    for file in items:
        whole = file.read_bytes()
        flip_a_bit(file, rng)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = Checkpoints(tmp_path / "run")._newest(
                ocp.args.Composite(
                    train=ocp.args.StandardRestore(abstract(tree)),
                    ema=ocp.args.StandardRestore(abstract(tree)),
                    config=ocp.args.JsonRestore(),
                    data=ocp.args.JsonRestore(),
                )
            )
        assert found[0] == 1, file
        named = file.relative_to(newest).as_posix()
        assert any(named in str(w.message) for w in told)
        file.write_bytes(whole)
    assert Checkpoints(tmp_path / "run").read_config() == {"step": 2}


def test_a_checkpoint_with_a_file_that_the_system_cannot_read_is_passed_over(tmp_path, monkeypatch):
    saved(tmp_path)
    digest = checksums.digest

    def fails(file):
        if "/checkpoints/2/ema/" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file)

    monkeypatch.setattr(checksums, "digest", fails)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert Checkpoints(tmp_path).restore_ema()[0] == 1


def test_every_checkpoint_has_its_checksums_however_long_the_one_before_takes(
    tmp_path, monkeypatch
):
    seal = Checkpoints._seal

    def late(self):
        time.sleep(0.2)
        seal(self)

    monkeypatch.setattr(Checkpoints, "_seal", late)
    saved(tmp_path)
    for step in ("1", "2"):
        assert (tmp_path / "checkpoints" / step / "SHA256SUMS").is_file()


def test_a_missing_file_of_a_checkpoint_is_named(tmp_path):
    saved(tmp_path)
    lost = next((tmp_path / "checkpoints" / "2" / "ema").rglob("d/*"))
    lost.unlink()
    with pytest.warns(UserWarning, match=f"{lost.name} is missing"):
        assert Checkpoints(tmp_path).restore_ema()[0] == 1


def test_a_reader_finds_a_whole_checkpoint_when_its_run_removes_the_one_it_reads(
    tmp_path, monkeypatch
):
    saved(tmp_path)
    reader = Checkpoints(tmp_path)
    look = Checkpoints._damage

    def removed(self, folder, items):
        if folder.name == "2":
            saved(tmp_path, steps=(3,))
            shutil.rmtree(folder)
        return look(self, folder, items)

    monkeypatch.setattr(Checkpoints, "_damage", removed)
    assert reader.restore_ema()[0] == 3


@pytest.mark.parametrize("name", ["exp [v2]", "a*", "what?", "x]"])
def test_a_folder_named_as_a_pattern_is_refused_before_it_is_made(tmp_path, name):
    with pytest.raises(UserError, match="named without"):
        Checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["{a}", "a#b", "100%", "a: b", "it's", 'a "b"', "ü 漢", "a" * 200])
def test_a_folder_of_any_other_name_gives_its_checkpoints_back(tmp_path, name):
    saved(tmp_path / name)
    assert Checkpoints(tmp_path / name).restore_ema()[0] == 2


def test_what_a_killed_save_has_left_is_removed_by_the_run_that_goes_on(tmp_path):
    saved(tmp_path, steps=(1,))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    Checkpoints(tmp_path)
    assert (folder / "2.orbax-checkpoint-tmp").is_dir()  # it may be under way
    Checkpoints(tmp_path, clears=True)
    assert [p.name for p in folder.iterdir()] == ["1"]


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_passed_over_a_damaged_checkpoint_saves_that_step_again(tmp_path):
    tree = saved(tmp_path)
    damage(tmp_path / "checkpoints" / "2")
    sums = (tmp_path / "checkpoints" / "2" / "SHA256SUMS").read_bytes()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(train=abstract(tree), ema=abstract(tree))
    again = {"w": jnp.full((8, 8), 5.0), "n": jnp.int32(2)}
    checkpoints.save(2, train=again, ema=again, config={}, data={})
    checkpoints.close()
    step, ema, _ = Checkpoints(tmp_path).restore_ema()
    assert step == 2 and float(ema["w"][0, 0]) == 5.0
    aside = tmp_path / "checkpoints" / "2.damaged1" / "SHA256SUMS"
    assert aside.read_bytes() == sums  # it is not made to look whole


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


def test_a_folder_that_is_removed_while_a_checkpoint_is_written_is_told(tmp_path, monkeypatch):
    saved(tmp_path, steps=(1,))
    checkpoints = Checkpoints(tmp_path)

    def removed():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path))

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", removed)
    monkeypatch.setattr("cascade.storage.checkpoint._leave_after_all", lambda: None)
    with pytest.raises(UserError, match="was removed while a checkpoint was written"):
        checkpoints.close()


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


def test_what_the_system_said_is_found_behind_what_was_raised_for_it():
    full = OSError(errno.ENOSPC, "No space left on device")
    later, caused = ValueError("while it was cleared up"), ValueError("not written")
    later.__context__, caused.__cause__ = full, full
    told = [RuntimeError(f"a file: {text} at a line") for text in ("[OS error 28: No", "")]
    said = [checkpoint._of_the_system(e) for e in (full, later, caused, *told)]
    assert said == [full.strerror] * 4 + [None]


@pytest.mark.filterwarnings("ignore")
def test_no_readable_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    saved(tmp_path, steps=(1,))
    damage(tmp_path / "checkpoints" / "1")
    with pytest.raises(UserError, match="no readable checkpoint"):
        Checkpoints(tmp_path).restore_ema()
