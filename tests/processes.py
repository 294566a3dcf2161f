"""Processes of their own for tests, forked from one that has imported everything already."""

import contextlib
import multiprocessing
import os
import socket

# What makes programs compile fast, for processes that see one device: conftest's, less the eight.
ONE_DEVICE = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("cascade.training.loop", "cascade.training.stage_training"),
        *("cascade.runner.cascade", "cascade.commands.sample", "grain"),
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


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
