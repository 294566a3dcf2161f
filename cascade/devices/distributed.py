"""Several processes as one program: how they find each other, and how they end together.

One process for each machine (TPU pods) or each GPU (SLURM) runs the same command. JAX joins them;
from then on every process sees all devices and takes part in every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cascade.devices import xla_flags
from cascade.errors import UserError

HELP = """Several machines, or several processes on one: start the same command in each.
  SLURM (srun), Open MPI, TPU pods: they find each other by themselves.
  Elsewhere set, for each of N processes I = 0 .. N - 1, before the command:
    JAX_COORDINATOR_ADDRESS=HOST:PORT  where process 0 runs; any free port
    JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=I
All must see the same folder."""

# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT = 40


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """While entered, this process is one of all that run this command. JAX starts in here.

    An error in one of several ends its process at once: to leave in the ordinary way it would wait
    for the others, which wait for it. They notice that it is gone, and end too.
    """
    join(os.environ)
    try:
        yield
    except BaseException as e:
        import jax

        if jax.process_count() == 1:
            raise
        _leave(e)
    import jax

    if jax.distributed.is_initialized():
        # All wait here for the last one: were the first, which serves the others, to leave before,
        # they would take it for lost and abort.
        jax.distributed.shutdown()


def agree(what: Mapping[str, str]) -> None:
    """Stop all processes, with UserError in each, unless every one was given the same.

    what: named things that decide what a process does, such as its config as JSON.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest() for text in what.values()]
    own = np.frombuffer(b"".join(digests), np.uint8).reshape(len(what), 32)
    everyone = np.asarray(multihost_utils.process_allgather(own))
    for number, theirs in enumerate(everyone):
        other = [name for i, name in enumerate(what) if (theirs[i] != everyone[0][i]).any()]
        if other:
            raise UserError(
                f"process {number} of {len(everyone)} was started with another "
                f"{' and another '.join(other)} than process 0; start the same command in each"
            )


def all_or_none(call: Callable[[], None]) -> None:
    """Call it in the first process; where it raises UserError there, all processes raise it.

    The others say only that the first one could not go on.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    refused: UserError | None = None
    if jax.process_index() == 0:
        try:
            call()
        except UserError as e:
            refused = e
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(refused is None))
        if not fine.all() and refused is None:
            raise UserError("process 0 could not go on, and has said why")
    if refused is not None:
        raise refused


def wait(name: str) -> None:
    """Go on when all processes have come here. name: of the place, the same in each of them."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"cascade {name}")


def join(environment: Mapping[str, str]) -> None:
    """Join the other processes, if the environment tells of any.

    Raises UserError for JAX_ variables that are incomplete or no numbers.
    """
    if given := _explicit(environment):
        import jax

        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
    elif in_cluster(environment):
        import jax

        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    elif xla_flags.expected_backend() == "tpu":
        import jax

        # A TPU host asks its metadata whether it is part of a pod; one in a notebook has none.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started this process as one of several; JAX finds out the rest."""
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True  # not so in the job's script itself, outside of srun
    return int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1


def _explicit(environment: Mapping[str, str]) -> dict[str, Any]:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (environment.get(name, "") for name in names)
    if not any((address, *numbers)):
        return {}
    for name, value in zip(names, (address, *numbers), strict=True):
        if not value or (name != names[0] and not value.isdigit()):
            raise UserError(
                f"{name} must be {'HOST:PORT' if name == names[0] else 'a number'}, got "
                f"{value!r}; several processes need {', '.join(names)}"
            )
    if ":" not in address:
        raise UserError(f"{names[0]} must be HOST:PORT, got {address!r}")
    count, number = map(int, numbers)
    if number >= count:
        raise UserError(f"JAX_PROCESS_ID must be in 0..{count - 1}, got {number}")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def _leave(error: BaseException) -> None:
    import jax

    if isinstance(error, UserError):
        message, status = str(error), 2
    elif isinstance(error, SystemExit):
        message, status = "", error.code if isinstance(error.code, int) else 0
    elif isinstance(error, jax.errors.JaxRuntimeError):
        message = (
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({str(error).splitlines()[0][:200]}); start all of them again, and the run goes on "
            "from its last checkpoint"
        )
        status = 1
    else:
        traceback.print_exception(error)
        message, status = f"process {jax.process_index()} of {jax.process_count()} ended", 1
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
