"""Processes of their own for tests, forked from one that has imported everything already."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# What makes programs compile fast, for processes that see one device: conftest's, less the eight.
ONE_DEVICE = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("cascade.training.loop", "cascade.training.stage_training"),
        *("cascade.runner.cascade", "cascade.commands.sample", "grain", "cascade.cli"),
        *("cascade.commands.train", "cascade.commands.export", "cascade.scenes.dataset"),
    ]
)


def start(function, *args, environment=()):
    """A running process that calls function(*args), a function of a test file, on one device.

    Its errors go to stderr. Compiled programs are kept in the folder that the environment names.
    """
    process = CONTEXT.Process(target=_run, args=(function, args, dict(environment)))
    process.start()
    return process


def start_group(count, function, *args, environment=()):
    """`count` processes that know of each other by what `cascade train` reads."""
    address = f"localhost:{_free_port()}"
    return [
        start(
            function,
            *args,
            environment={
                **dict(environment),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            },
        )
        for i in range(count)
    ]


def cascade(*words, cwd, environment=()):
    """What `cascade WORDS` does, said in the folder `cwd` on one device: a CompletedProcess.

    Python's start and all imports, two seconds of each `python -m cascade`, are spared.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        words = [str(word) for word in words]
        ended = start(_command, words, str(cwd), *map(str, files), environment=environment)
        (code,) = codes([ended])
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))


def codes(processes, seconds=300):
    """Their exit codes; they are killed, with code -9, if they take longer."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _run(function, args, environment):
    flags = os.environ["XLA_FLAGS"].split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    os.environ.update(environment)
    import jax

    if cache := environment.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with contextlib.suppress(KeyboardInterrupt):
        function(*args)


def _command(words, folder, out, err):
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.path.insert(0, "")
    from cascade import cli

    cli.main(words)


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
