import json
import os
import subprocess
import sys
import threading
import time

import processes
import pytest

from cascade.errors import UserError
from cascade.storage import lock
from cascade.storage.lock import Lock


def hold(folder):
    with Lock(folder, beat=0.05):
        (folder / "held").touch()
        time.sleep(600)


def held(folder):
    """A process that holds the folder."""
    process = processes.start(hold, folder)
    while not (folder / "held").exists():
        time.sleep(0.02)
    return process


def elsewhere(folder, **changes):
    """Write the file as a training on another machine would."""
    told = {"owner": "ann", "host": "far", "process": 7, "begun": "then", "machine": "its"}
    (folder / "new").write_text(json.dumps(told | {"token": "t", "beats": 0} | changes))
    os.replace(folder / "new", folder / lock.NAME)


def test_the_second_is_refused_at_once_with_who_holds_it_and_the_first_goes_on(tmp_path):
    first = held(tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"process {first.pid}, since 20.*another --workdir"):
        Lock(tmp_path).__enter__()
    assert time.monotonic() - began < lock.STALE / 2 and first.is_alive()
    first.kill()
    first.join()


def test_what_a_killed_one_held_is_taken_over_at_once(tmp_path):
    first = held(tmp_path)
    first.kill()
    first.join()
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began < lock.STALE / 2
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()


def test_a_process_that_has_ended_is_no_more_though_its_parent_has_not_asked_how():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie, and stays one
    assert lock._process_begun(child.pid) is None and lock._process_begun(os.getpid())
    child.wait()


def test_a_later_process_with_the_number_of_the_holder_holds_nothing(tmp_path):
    own = {"machine": lock._machine(), "process": os.getpid()}
    elsewhere(tmp_path, **own, process_begun="before")
    with Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["owner"] != "ann"
    elsewhere(tmp_path, **own, process_begun=lock._process_begun(os.getpid()))
    with pytest.raises(UserError, match="ann on far"):
        Lock(tmp_path).__enter__()


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    with Lock(tmp_path), pytest.raises(UserError, match="a training holds this folder"):
        Lock(tmp_path).__enter__()


def test_another_machine_that_renews_it_holds_it(tmp_path):
    elsewhere(tmp_path)
    beats = threading.Timer(0.3, elsewhere, (tmp_path,), {"beats": 1})
    beats.start()
    with pytest.raises(UserError, match="ann on far, process 7, since then"):
        Lock(tmp_path, stale=20.0).__enter__()


def test_another_machine_that_gives_no_sign_is_taken_over_after_the_stated_time(tmp_path):
    elsewhere(tmp_path)
    began = time.monotonic()
    with Lock(tmp_path, stale=1.0):
        assert time.monotonic() - began > 1


def test_a_folder_that_another_machine_gives_up_while_it_is_watched_is_free(tmp_path):
    elsewhere(tmp_path)
    threading.Timer(0.2, (tmp_path / lock.NAME).unlink).start()
    with Lock(tmp_path, beat=0.1, stale=20.0):
        assert json.loads((tmp_path / lock.NAME).read_text())["owner"] != "ann"


def renewed(mine, before=None):
    """What the file says once it is there and says something else."""
    end = time.monotonic() + 20
    while (now := mine._read()) in (None, before):
        assert time.monotonic() < end, "it was not renewed"
        time.sleep(0.005)
    return now


def test_a_holder_writes_something_else_at_every_beat_also_after_it_could_not(
    tmp_path, monkeypatch
):
    write, refused = Lock._write, threading.Event()

    def refused_once(self):
        if not refused.is_set():
            refused.set()
            raise OSError("no space left")
        write(self)

    with Lock(tmp_path, beat=0.01) as mine:
        first = renewed(mine)
        renewed(mine, first)
        monkeypatch.setattr(Lock, "_write", refused_once)
        assert refused.wait(20)
        renewed(mine, mine._read())
        (tmp_path / lock.NAME).unlink()  # as where it cannot be read at one time
        assert renewed(mine)["token"] == first["token"] and not mine.lost


def test_a_holder_that_was_taken_over_knows_it_and_leaves_the_file_of_the_next(tmp_path):
    with Lock(tmp_path, beat=0.02) as mine:
        assert not mine.lost
        elsewhere(tmp_path)
        end = time.monotonic() + 60
        while not mine.lost and time.monotonic() < end:
            time.sleep(0.01)
        assert mine.lost
    assert json.loads((tmp_path / lock.NAME).read_text())["owner"] == "ann"


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"\xff\xfe", b"{}", b'{"process": "x"}'])
def test_a_damaged_file_is_taken_over(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with Lock(tmp_path, stale=0.1):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()


def test_of_several_that_take_it_over_at_once_one_holds_it(tmp_path):
    elsewhere(tmp_path)
    got, refused = [], []

    def take():
        try:
            got.append(Lock(tmp_path, stale=0.2).__enter__())
        except UserError as e:
            refused.append(e)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5
    got[0].__exit__()


def test_of_two_that_found_it_given_up_at_once_the_later_writer_holds_it(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    both, holds = threading.Barrier(2), Lock._holds

    def found(self, there):
        if there["owner"] != "ann":
            return holds(self, there)
        both.wait(60)
        return False

    monkeypatch.setattr(Lock, "_holds", found)
    ends = []

    def take():
        try:
            ends.append(Lock(tmp_path).__enter__())
        except UserError:
            ends.append(None)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (one,) = [end for end in ends if end is not None]
    assert one._read()["token"] == one._own["token"]
    one.__exit__()


def test_where_a_file_cannot_refuse_a_second_writer_the_last_one_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cascade.storage.paths.is_remote", lambda path: True)
    monkeypatch.setattr(Lock, "_holds", lambda self, there: True)
    monkeypatch.setattr(time, "sleep", lambda seconds: elsewhere(tmp_path))
    with pytest.raises(UserError, match="ann on far"):
        Lock(tmp_path).__enter__()
