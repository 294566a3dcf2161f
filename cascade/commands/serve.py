"""Draw pictures in the browser."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cascade import config
from cascade.errors import OptionError, UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures in the browser.

    This opens the model, prints the page's address on stderr and serves the page until Ctrl-C. The
    page draws one picture after another: who asks while another drawing is made sees their place in
    the queue. A drawing makes at most 16 pictures, in at most 1000 steps a stage; an upload, which
    is a picture to begin from or the JSON of a picture to repeat, has at most 16 MiB. Pictures are
    kept in a temporary folder until the tab that drew them closes, or draws anew, and the folder is
    removed at the end: save what you like. Nothing is loaded from elsewhere, and nothing is sent.
    There is no password: whoever reaches the address can draw. Needs pip install
    'cascade-diffusion[page]'.
    """

    model: str = "scenes"
    """A model that draws from text, as `cascade sample --model` takes it."""
    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1 is reached from this machine alone, 0.0.0.0 from every
    machine that reaches this one."""
    port: int = 7860
    """The port to listen at, 0 to 65535; 0 takes any that is free."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """As for `cascade sample`: the type of public weights and of their computation."""
    t5_int8: bool = False
    """As for `cascade sample`: keep the text encoder's matrices in int8."""
    offload: bool = False
    """As for `cascade sample`: keep weights in the host's memory while they are not at work."""
    compilation_cache: bool = False
    """Keep compiled programs in the user's cache folder, so that first pictures come faster: then
    that is written, too."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade serve` with the words after it. Raises UserError for a person's mistake."""
    options = config.parse(Options, argv, prog="cascade serve")
    if options.model == "":
        raise UserError("--model is empty; give a folder or a name, or leave it out")
    with _listening(options.host, options.port) as listener, _temporary_folder() as folder:
        try:
            from cascade.runner import page
        except ImportError as e:
            if (e.name or "").partition(".")[0] not in ("gradio", "fastapi", "uvicorn"):
                raise
            raise UserError(
                "the page in the browser needs gradio; pip install 'cascade-diffusion[page]'"
            ) from None
        if options.compilation_cache:
            from cascade.devices.programs import use_compilation_cache

            use_compilation_cache()
        from cascade.runner.cascade import Cascade

        model = Cascade.load(
            options.model, dtype=options.dtype, t5_int8=options.t5_int8, offload=options.offload
        )
        served = page.Page(model, folder)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"the page is at http://{host}:{port} until Ctrl-C", file=sys.stderr, flush=True)
        served.serve(listener)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there, so that a port that is taken is told before anything loads."""
    if not 0 <= port <= 65535:
        raise OptionError("port", port, "must be 0 to 65535")
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=kind)
    except (OSError, UnicodeError) as e:
        if isinstance(e, OSError) and e.errno == errno.EADDRINUSE:
            rule = "is in use by another program; end that, or give another port, such as 7861"
            raise OptionError("port", port, rule) from None
        if isinstance(e, OSError) and e.errno == errno.EACCES:
            rule = "may not be listened at; give one above 1023, such as 7860"
            raise OptionError("port", port, rule) from None
        raise OptionError(
            "host", host, "is no address of this machine; give one, such as 127.0.0.1"
        ) from None
    with listener:
        yield listener


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder for all that is written while the page is served, by gradio and matplotlib too."""
    with tempfile.TemporaryDirectory(prefix="cascade-page-", ignore_cleanup_errors=True) as folder:
        folder = os.path.realpath(folder)
        names = ("TMPDIR", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "MPLCONFIGDIR")
        # Both send what they count to their makers unless they are told not to.
        quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        before, tempdir = dict(os.environ), tempfile.tempdir
        os.environ.update({name: folder for name in names} | quiet)
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = tempdir
            os.environ.clear()
            os.environ.update(before)
