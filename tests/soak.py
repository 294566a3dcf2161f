"""Faults, again and again, for `launch/soak.sh`, which says what it does.

A fault is lost data where a command, repeated after it, does not end with the bits of a run that
nobody touched.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from cascade.data.inspection import dataset_in

ROOT = Path(__file__).parent.parent
CASES = 250
"""Mutations of one call of the fuzz test."""
EXPORTED = ("base8/model.safetensors", "text_encoder/model.safetensors", "SHA256SUMS")
HANGS = 300.0
"""A command that takes so many seconds hangs."""
CONFIG = """
from cascade import testing
from cascade.scenes.dataset import ScenesData
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


def config():
    return StageTraining(
        stage=testing.smallest_stage(text_width=128),
        data=ScenesData(),
        images=400,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-3),
        save_every_images=40,
        log_every_images=8,
        preview_every_images=0,
    )
"""


class Soak:
    """Does the commands in a folder, and counts."""

    def __init__(self, folder, seed):
        self.folder, self.draw = Path(folder).absolute(), random.Random(seed)
        self.counts = collections.Counter(
            kills=0, mutations=0, full_disks=0, lost=0, tracebacks=0, hangs=0
        )
        self.told = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "config.py"
        self.config.write_text(CONFIG)
        self.seconds, self.bits = {}, {}

    def words(self, what, out):
        """The command that makes `out`."""
        return {
            "train": ["train", self.config, "--workdir", out],
            "export": ["export", self.folder / "train", out],
            "data": ["data", "make", out, "--count", "200", "--resolution", "16"],
        }[what]

    def begin(self):
        """Do each command untouched, for its bits and its time."""
        for what in ("train", "export", "data"):
            out = self.folder / what
            began = time.monotonic()
            self.whole(what, out)
            self.seconds[what] = time.monotonic() - began
            self.bits[what] = self.bits_of(what, out)

    def environment(self, compiled=True):
        kept = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs")} if compiled else {}
        return os.environ | kept | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(self, command, compiled=True):
        log = (self.folder / "stderr").open("wb")
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment(compiled),
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )

    def cascade(self, what, out, compiled=True):
        return self.start([sys.executable, "-m", "cascade", *self.words(what, out)], compiled)

    def ended(self, process, seconds=None):
        """The status; one that hangs is counted and killed. Tracebacks are counted."""
        try:
            status = process.wait(seconds or HANGS)
        except subprocess.TimeoutExpired:
            self.note("hangs", "a command")
            status = self.kill(process)
        text = (self.folder / "stderr").read_text(errors="replace")
        if "Traceback" in text:
            self.note("tracebacks", text[text.index("Traceback") :][:2000])
        return status

    def kill(self, process):
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def note(self, kind, told):
        self.counts[kind] += 1
        self.told.append(f"{kind}: {told}")
        print(f"{kind}: {told}", file=sys.stderr, flush=True)

    def whole(self, what, out):
        """Do the command to its end."""
        status = self.ended(self.cascade(what, out))
        if status:
            said = (self.folder / "stderr").read_text(errors="replace")[-500:]
            self.note("lost", f"{what} cannot be repeated (status {status}): {said}")

    def bits_of(self, what, out):
        """What must be alike: weights, a run's figures, a dataset's examples."""
        if what == "train":
            model = self.folder / "model"
            shutil.rmtree(model, ignore_errors=True)
            command = [sys.executable, "-m", "cascade", "export", out, model]
            if self.ended(self.start(command)):
                return "its export failed"
            rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
            weights = _digest(model / "base8" / "model.safetensors")
            return weights, [(row["images"], row["loss"]) for row in rows]
        if what == "data":
            source = dataset_in(str(out)).open(16)
            examples = [source[i] for i in range(len(source))]
            return [(e["caption"], hashlib.sha256(e["image"]).hexdigest()) for e in examples]
        return [_digest(out / file) for file in EXPORTED]

    def compare(self, what, out):
        found = self.bits_of(what, out)
        if found != self.bits[what]:
            self.note("lost", f"{what}: {str(found)[:300]} is not {str(self.bits[what])[:300]}")
        shutil.rmtree(out, ignore_errors=True)

    def killed(self, what, times):
        """Kill the command that often, each at a random moment, and do it to its end."""
        out = self.folder / f"killed_{what}"
        for _ in range(times):
            compiled = self.draw.random() > 0.3  # else the first compilation is met
            process = self.cascade(what, out, compiled)
            time.sleep(self.draw.uniform(0.3, min(12.0, 1.1 * self.seconds[what])))
            done = process.poll() is not None
            self.kill(process)
            self.ended(process)
            self.counts["kills"] += not done
            if what != "train" and out.exists():  # then it must be whole
                break
        if what == "train" or not out.exists():
            self.whole(what, out)
        self.compare(what, out)

    def filled(self, what):
        """Do the command on a disk that is too small, make room, and do it again."""
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        size = int(4096 * self.draw.uniform(1, 22) ** 2)
        need = "" if os.geteuid() == 0 else "--map-root-user"
        words = " ".join([sys.executable, "-m", "cascade", *map(str, self.words(what, disk / "x"))])
        copy = self.folder / "filled"
        script = (
            f"mount -t tmpfs -o size={size} tmpfs {disk} || exit 77; {words}; first=$?; "
            f"[ -n \"$(find {disk} -name '*.partial' -o -name '*-tmp')\" ] && exit 78; "
            f"mount -o remount,size=256m {disk}; "
            f"[ $first = 0 ] || {words} || exit 79; cp -r {disk}/x {copy}; exit $first"
        )
        command = ["unshare", "--mount", *need.split(), "bash", "-c", script]
        status = self.ended(self.start(command), 2 * HANGS)
        if status == 77:
            return False
        said = (self.folder / "stderr").read_text(errors="replace")
        if status == 78:
            self.note("lost", f"{what} on {size} bytes leaves temporary files")
        elif status not in (0, 2) or (status == 2 and said.count("error: ") != 1):
            self.note("lost", f"{what} on {size} bytes: status {status}: {said[-500:]}")
        else:
            self.counts["full_disks"] += status == 2
            self.compare(what, copy)
        shutil.rmtree(copy, ignore_errors=True)
        return True

    def mutate(self, seed):
        folder = self.folder / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [sys.executable, "tests/test_fuzz.py", folder, str(CASES), str(seed)]
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=2 * HANGS
            )
        except subprocess.TimeoutExpired:
            self.note("hangs", f"the fuzz test with seed {seed}")
            return
        if done.returncode:
            self.note("tracebacks", f"the fuzz test with seed {seed}: {done.stderr[-2000:]}")
            return
        failed, _ = json.loads(done.stdout.splitlines()[-1])
        self.counts["mutations"] += CASES
        for line in failed:
            self.note("tracebacks", f"seed {seed}, {line}")


def _digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(folder, minutes, seed):
    soak = Soak(folder, seed)
    end = time.monotonic() + 60 * minutes
    print("the commands without a fault", file=sys.stderr, flush=True)
    soak.begin()

    def mutate():
        number = 1000 * seed
        while time.monotonic() < end:
            soak.mutate(number)
            number += 1

    mutating = threading.Thread(target=mutate)
    mutating.start()
    disks, last = True, time.monotonic()
    while time.monotonic() < end:
        soak.killed(*soak.draw.choice((("train", 10), ("train", 10), ("export", 3), ("data", 3))))
        disks = disks and soak.filled(soak.draw.choice(("train", "train", "export", "data")))
        if time.monotonic() - last > 30:
            last = time.monotonic()
            left = max(0, round((end - last) / 60))
            print(f"{dict(soak.counts)}, {left} minutes left", file=sys.stderr, flush=True)
    mutating.join()
    if not disks:
        print("no full disks: this system mounts none", file=sys.stderr)
    print(json.dumps({"minutes": minutes, "seed": seed, **soak.counts, "told": soak.told}))
    return int(any(soak.counts[kind] for kind in ("lost", "tracebacks", "hangs")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
