"""Files that anybody may have damaged or made up: they open, or are refused in a line.

Models, text encoders, vocabularies, datasets, the figures of runs.

CASCADE_FUZZ=10000 runs so many cases, CASCADE_FUZZ_SEED=7 others. Nothing is drawn or compiled. The
cases run in a process of their own, since the tests' own check the types of every call.
"""

import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
import tracemalloc
from pathlib import Path

from model_folders import model_folder
from PIL import Image
from pipelines import IF8, IF16, T5, write_model, write_pipeline, write_upscaler

from cascade import testing
from cascade.data.inspection import dataset_in
from cascade.data.source import BadRecord
from cascade.errors import UserError
from cascade.runner.cascade import check_chain
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make
from cascade.stage import Stage
from cascade.storage import weights
from cascade.text import t5
from cascade.text.tokenizer import Tokenizer
from cascade.training.log import TrainingLog

CASES = int(os.environ.get("CASCADE_FUZZ", "100"))
DEEP = CASES > 100
"""Many cases are asked for by name: then the networks are traced as well."""
SEED = int(os.environ.get("CASCADE_FUZZ_SEED", "0"))
MOST_SECONDS = 10.0
MOST_BYTES = 2**27
MOST_LETTERS = 1200

VALUES = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 10**6, 10**12, 10**30, 10**400, 1.5, -0.5),
    *(1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x", "../x", "\0", "1", "\ud83d"),
    *([], [0], [[[]]], [1, "x", None], ["x"] * 1000, [8] * 1000, {}, {"x": {"y": [{}]}}),
    {"type": "os.system"},
    {"type": "cascade.stage.space.Pixels", "resolution": 10**9},
    {"type": ["x"]},
)


def opened(folder):
    """All that is asked of a model before weights are read."""
    model = open_model(str(folder))
    check_chain(model.stages)
    for stage in model.stages:
        model.own_text_encoder(stage.name)
        model.files(stage.name)
        assert stage.resolution > 0 and stage.sampling.steps > 0
        if DEEP:
            Stage(stage).abstract()
    assert isinstance(model.text_encoder, str) and model.max_tokens > 0
    assert isinstance(model.captions, str) and set(model.known_words) is not None


def opened_text_encoder(folder):
    """The config, and whether the shapes in the header of its weights are those it asks for."""
    config = t5.read_config(folder)
    with weights.opened(folder, "model", what="text encoder", convert="") as file:
        t5.check(file.name, file.shapes, config)


def make_vocabulary(to):
    to.mkdir()
    shutil.copy(T5 / "spiece.model", to)


def read_vocabulary(folder):
    """The vocabulary as a text encoder reads it, and a prompt through it."""
    file = folder / "spiece.model"
    try:
        tokenizer = Tokenizer(file.read_bytes(), 16)
        tokenizer.pieces("a red circle")
    except ValueError as e:
        raise UserError(f"{file} {e}") from None


def make_pictures(to):
    to.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(to / f"{name}.png")
    lines = [json.dumps({"file": f"{name}.png", "caption": "a red one"}) for name in ("a", "b")]
    (to / "captions.jsonl").write_text("\n".join(lines))


def read_dataset(folder):
    """Every example, or why it is left out."""
    with contextlib.redirect_stderr(io.StringIO()):
        source = dataset_in(str(folder)).open(8)
    for i in range(len(source)):
        with contextlib.suppress(BadRecord):
            assert source[i]["image"].shape == (8, 8, 3)


def make_figures(to):
    to.mkdir()
    rows = [{"step": i, "images": 8 * i, "loss": 1.0 / i, "skipped": 0} for i in range(1, 5)]
    (to / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_figures(folder):
    """A run that goes on reads its figures; no damage to them stops it."""
    (folder / "run").mkdir()
    shutil.copy(folder / "metrics.jsonl", folder / "run")
    try:
        log = TrainingLog(folder / "run", "run", step=4, batch_size=8, skip_limit=3)
        assert len(log._rows) <= 1000 * 4
        log.close()
    except UserError:
        raise AssertionError("a damaged row stops a run") from None
    finally:
        shutil.rmtree(folder / "run")


KINDS = {
    "ours": (lambda to: model_folder(to, testing.base_stage()), opened),
    "if": (lambda to: write_model(to, IF8, IF16), opened),
    "stage1": (functools.partial(write_pipeline, stage=1), opened),
    "stage2": (functools.partial(write_pipeline, stage=2), opened),
    "upscaler": (write_upscaler, opened),
    "old": (lambda to: shutil.copytree(OLD, to), opened),
    "t5": (lambda to: shutil.copytree(T5, to), opened_text_encoder),
    "vocabulary": (make_vocabulary, read_vocabulary),
    "pictures": (make_pictures, read_dataset),
    "tfds": (lambda to: make(ScenesData(), to, count=3, resolution=8) and None, read_dataset),
    "figures": (make_figures, read_figures),
}
ANY_FILE = ("vocabulary", "pictures", "tfds", "figures")
OLD = Path(__file__).parent / "fixtures" / "version_0_1_0" / "native_model"


def places(value):
    """(container, key) of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def damaged(content, draw):
    """The bytes of any file with some of them changed, and in words what."""
    data = bytearray(content)
    at = draw.randrange(len(data))
    kind = draw.choice(("flip", "flip", "cut", "zeros", "noise", "twice"))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "noise":
        data[at : at + 8] = draw.randbytes(len(data[at : at + 8]))
    else:
        data[at:at] = data[at : at + 100]
    return bytes(data), f"{kind} at {at}"


def mutated(text, draw):
    """The bytes of a JSON file with something in it changed, and in words what."""
    kind = draw.random()
    if kind < 0.1:
        data = bytearray(text.encode())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        return bytes(data), f"bit of byte {at} flipped"
    if kind < 0.15:
        at = draw.randrange(len(text))
        return text[:at].encode(), f"cut at {at}"
    if kind < 0.18:
        whole = draw.choice(VALUES)
        return json.dumps(whole).encode(), f"the whole is {whole!r:.40}"
    if kind < 0.2:
        depth = draw.choice((300, 900, 100_000))
        return b"[" * depth + b"]" * depth, f"nested {depth} deep"
    value = json.loads(text)
    told = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        container, key = draw.choice(list(places(value)) or [({"x": 0}, "x")])
        if draw.random() < 0.2:
            del container[key]
            told.append(f"{key} dropped")
        elif draw.random() < 0.1:
            container[key] = [copy.deepcopy(container[key])] * draw.choice((2, 1000))
            told.append(f"{key} repeated")
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
            told.append(f"{key} = {container[key]!r:.40}")
    return json.dumps(value).encode(), "; ".join(told)


def failures(root, cases, seed):
    """Lines about cases that neither open nor are refused in a line, and how many are refused."""
    folders = {kind: make(root / kind) or root / kind for kind, (make, _) in KINDS.items()}
    draw = random.Random(seed)
    failed, refused = [], 0
    files = [
        (kind, file)
        for kind, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.suffix == ".json" or (kind in ANY_FILE and file.is_file())
        if "tokenizer" not in file.parts
    ]
    for kind in KINDS:
        KINDS[kind][1](folders[kind])  # as they are, all open
    for case in range(cases):
        kind, file = draw.choice(files)
        whole = file.read_bytes()
        if file.suffix == ".json":
            content, told = mutated(whole.decode(), draw)
        else:
            content, told = damaged(whole, draw)
        file.write_bytes(content)
        began, problem = time.process_time(), None
        tracemalloc.start()
        try:
            KINDS[kind][1](folders[kind])
        except UserError as e:
            refused += 1
            if "\n" in str(e) or len(str(e)) > MOST_LETTERS:
                problem = f"its message has {len(str(e))} letters: {str(e)[:200]!r}"
        except Exception as e:
            line = traceback.extract_tb(e.__traceback__)[-1]
            problem = f"{type(e).__name__}: {str(e)[:200]!r} ({line.filename}:{line.lineno})"
        finally:
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            file.write_bytes(whole)
        if (seconds := time.process_time() - began) > MOST_SECONDS or taken > MOST_BYTES:
            problem = problem or f"{seconds:.1f} s and {taken} bytes"
        if problem:
            failed.append(f"case {case}, {file.relative_to(root)}, {told}: {problem}")
    return failed, refused


def test_a_changed_file_opens_or_is_refused_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(CASES), str(SEED)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed, refused = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(failed)
    assert refused > CASES // 2


if __name__ == "__main__":
    print(json.dumps(failures(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
