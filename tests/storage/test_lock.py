import json
import os
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
