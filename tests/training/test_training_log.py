import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from cascade.devices import xla_flags
from cascade.devices.chips import chip_of
from cascade.errors import UserError
from cascade.training import log as training_log
from cascade.training.log import TrainingLog


@pytest.fixture(scope="module", autouse=True)
def plain_curves():
    """Here they are drawn."""


def log_in(folder, **options):
    options = {"step": 0, "batch_size": 4, "skip_limit": 3, **options}
    return TrainingLog(folder, "title", **options)


def metrics(loss, skipped=False):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(loss), "skipped": jnp.bool(skipped)}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_the_mean_of_its_finite_steps_and_counts_the_others(tmp_path):
    log = log_in(tmp_path)
    for loss, skipped in ((1.0, False), (float("nan"), True), (3.0, False)):
        log.add(metrics(loss, skipped), waited=0.5)
    row = log.write(3)
    log.add(metrics(float("inf"), True), waited=0.0)
    log.write(4)
    log.close()
    assert (row["loss"], row["skipped"], row["images"]) == (2.0, 1, 12)
    assert row["data_wait_seconds"] == 0.5
    assert [(r["loss"], r["skipped"]) for r in rows(tmp_path)] == [(2.0, 1), (None, 1)]
    assert (tmp_path / "loss.png").exists() and any((tmp_path / "tensorboard").iterdir())


def test_the_curve_is_drawn_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    log, drawn = log_in(tmp_path), []
    monkeypatch.setattr(training_log, "_plot_loss", lambda rows, *_: drawn.append(len(rows)))
    for step, seconds in enumerate([60.0, 60.0, -1.0, 60.0], start=1):
        monkeypatch.setattr(training_log, "PLOT_SECONDS", seconds)
        log.add(metrics(1.0), waited=0.0)
        log.write(step)
    log.close()
    assert drawn == [3, 4]


def test_waiting_for_data_is_counted_in_one_row_and_all_writers_are_closed(tmp_path):
    log, closed = log_in(tmp_path), []
    for step, waited in ((1, 0.5), (2, 0.25)):
        log.add(metrics(1.0), waited=waited)
        assert log.write(step)["data_wait_seconds"] == waited
    log._writers.append(types.SimpleNamespace(close=lambda: closed.append(True)))
    log.close()
    assert closed == [True]


def test_speed_is_that_of_the_steps_without_the_pauses_between(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now[0])
    log = log_in(tmp_path)
    now[0] = 50.0
    log.compiled(1)
    for step, seconds, pause in ((3, 4.0, 1000.0), (5, 10.0, 2000.0), (7, 2.0, 0.0)):
        now[0] += seconds
        log.add(metrics(1.0), waited=0.0)
        now[0] += pause
        log.pause(pause)
        assert log.write(step)["step_seconds"] == seconds / 2
    log.close()


def test_a_changed_command_is_marked_in_the_row_and_in_the_plot(tmp_path):
    for name, told in (("plain", ""), ("changed", "optimizer.learning_rate: 0.1 before, 1 now")):
        (tmp_path / name).mkdir()
        log = log_in(tmp_path / name, changed=told)
        for step in (1, 2, 3):
            log.add(metrics(1.0 / step), waited=0.0)
            log.write(step)
        log.close()
        again = log_in(tmp_path / name, step=3)  # the mark is kept by a run that goes on
        again.close()
        assert [row.get("changed") for row in rows(tmp_path / name)] == [told or None, None, None]
    plots = [
        np.asarray(Image.open(tmp_path / n / "loss.png").convert("RGB")).astype(int)
        for n in ("plain", "changed")
    ]
    red = [(plot[..., 0] - plot[..., 1:].max(-1) > 100).sum() for plot in plots]
    assert red[0] == 0 and red[1] > 50


def test_only_skipped_steps_in_a_row_make_a_run_diverge_also_across_rows(tmp_path):
    log = log_in(tmp_path)
    seen = []
    for step, bad in enumerate([True, True, False, True, True, True], start=1):
        log.add(metrics(1.0, bad), waited=0.0)
        log.write(step)
        seen.append(log.diverged)
    assert seen == [False] * 5 + [True]


def test_rows_past_the_resumed_step_and_half_a_line_are_dropped(tmp_path):
    lines = [json.dumps({"step": s, "images": 4 * s, "loss": 1.0}) for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "im')
    log_in(tmp_path, step=2).close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_log_killed_while_it_drops_rows_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file, row = tmp_path / "metrics.jsonl", json.dumps({"step": 1, "loss": 1.0}) + "\n"
    file.write_text(row)

    def write_half(self, text):
        with self.open("w") as f:
            f.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        log_in(tmp_path, step=1)
    assert file.read_text() == row and list(tmp_path.iterdir()) == [file]


def test_tensorboard_is_told_to_replace_the_steps_after_the_resumed_one(tmp_path):
    log = log_in(tmp_path, step=2)
    log.add(metrics(1.0), waited=0.0)
    log.write(3)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # an event's length, a checksum, the event, a checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [e.step for e in events if e.HasField("session_log")] == [3]
    assert {e.step for e in events if e.HasField("summary")} == {3}


def test_utilization_is_flops_a_second_over_the_peak_of_the_devices(tmp_path, monkeypatch):
    devices = [
        types.SimpleNamespace(
            device_kind="NVIDIA H100 80GB HBM3",
            memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**30},
        )
        for n in (2, 3)
    ]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: next(clock))
    log = log_in(tmp_path, step_flops=1.978e15)
    for _ in range(2):
        log.add(metrics(1.0), waited=0.0)
    row = log.write(2)
    assert (row["step_seconds"], row["images_per_second"]) == (2.0, 2.0)
    # 2 steps in 4 s on 2 devices: a quarter of the FLOPs of a step each second on each
    assert row["tflops_per_device"] == pytest.approx(494.5)
    assert row["mfu"] == pytest.approx(0.5) and row["memory_gib"] == 3.0


def test_a_device_of_unknown_peak_says_so(tmp_path, capsys, monkeypatch):
    log = log_in(tmp_path, step_flops=1e9)
    log.add(metrics(1.0), waited=0.0)
    row = log.write(1)
    assert row["tflops_per_device"] > 0 and "mfu" not in row
    assert capsys.readouterr().err == ""  # nobody asks for a CPU's
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    log_in(tmp_path, step_flops=1e9).close()
    assert "cpu: its peak is not in the table" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind,teraflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks_are_those_of_the_makers(kind, teraflops):
    chip = chip_of(kind)
    assert chip is not None and chip.flops == teraflops * 1e12


def test_weights_and_biases_is_asked_only_when_named_and_continues_its_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    log_in(tmp_path).close()
    with pytest.raises(UserError, match="pip install wandb"):
        log_in(tmp_path, wandb="project")
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row["loss"])), finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        log = log_in(tmp_path, step=step - 1, wandb="project", config={"a": 1})
        log.add(metrics(1.0), waited=0.0)
        log.write(step)
        log.close()
    assert logged == [(1, 1.0), (2, 1.0)]
    assert started[0]["id"] == started[1]["id"] and started[0]["config"] == {"a": 1}
    for name in ("lr 1e-4 #2?", "50% : a\\b", "ü" * 80):  # it refuses / \ # ? % : in an id
        (tmp_path / name).mkdir()
        log_in(tmp_path / name, wandb="project").close()
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", started[-1]["id"])
    assert len({options["id"] for options in started}) == 4


def test_flags_are_added_for_the_backend_alone_and_never_over_the_users():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --mine"}
    xla_flags.apply("cpu", environment)
    assert environment["XLA_FLAGS"].split()[1:] == ["--mine"]
    xla_flags.apply("gpu", environment)
    flags = environment["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--mine"]
    assert flags[2:] == list(xla_flags.GPU[1:]) and list(environment) == ["XLA_FLAGS"]
    xla_flags.apply("tpu", environment)
    assert environment["LIBTPU_INIT_ARGS"].split() == list(xla_flags.TPU)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"5",
        b"null",
        b'"abc"',
        b'{"a": 1}',
        b'{"step": "x", "loss": 1}',
        b'{"step": null, "loss": 1}',
        b'{"step": -5, "loss": 1}',
        b'{"step": 1, "loss": [1]}',
        b'{"step": 1}',
        b"[" * 100_000,
        b'{"step": 1, "lo',
    ],
)
def test_a_damaged_row_is_left_out_and_blocks_nothing(tmp_path, line):
    good = {"step": 1, "images": 8, "loss": 0.5}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    log = log_in(tmp_path, step=2)
    log.close()
    assert [json.loads(row) for row in path.read_text().splitlines()] == [good]
