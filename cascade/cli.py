"""The console command: `cascade <verb>`.

A verb is a file of commands/, or of tasks/, with a function `main(argv)`; it is imported when it
is asked for, so that `cascade --help` needs no JAX. A task's main may return the words of another
command, which then does what it was asked for. A person's mistake (UserError) is one line and
exit status 2.
"""

from __future__ import annotations

import ast
import errno
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import OptionError, UserError

ORDER = (
    *("sample", "enlarge", "serve", "models", "train", "export", "convert", "eval", "data"),
    *("plan", "bench"),
)
"""In which usage lists them; others follow by name."""

# What a folder's permissions, a full disk or a name can do at any time: no fault of the program.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line. Exits 0 on success, 2 on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _run(argv)
        finally:
            sys.stdout.flush()  # so that a closed pipe is met here, and not at the very end
    except UserError as e:
        message = e.on_command_line if isinstance(e, OptionError) else str(e)
        print(f"error: {_line(message)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)  # as of programs that SIGPIPE ends
    except OSError as e:
        if e.errno not in _OF_THE_MACHINE:
            raise
        where = e.filename or "cascade " + " ".join(argv[:1])
        print(f"error: {_line(f'{where}: {e.strerror}')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("cascade-diffusion"))
        return
    from cascade.config import nearest, take_all, trust

    if any("\0" in word for word in argv):
        word = next(word for word in argv if "\0" in word)
        raise UserError(f"{word!r} has a NUL character, which no file's name has; remove it")
    known = verbs()
    if argv[0] not in known:
        raise UserError(f"{argv[0]!r} is no command of cascade{nearest(argv[0], list(known))}")
    # So that what is half-written is cleared away; training has a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Worker threads and libraries read these at import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file
    warnings.formatwarning = lambda message, *_: f"warning: {_line(str(message))}\n"
    modules, words = take_all(argv[1:], "--trust")
    for module in modules:
        trust(module)
    instead = importlib.import_module(known[argv[0]][0]).main(words)
    if instead is not None:  # a task's verb for what another does
        importlib.import_module(known[instead[0]][0]).main(instead[1:])


def _line(message: str) -> str:
    """As one line that a person can read and no terminal obeys: control characters, which names of
    files may have, are escaped; very long words, which were given so, are cut."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return re.sub(r"(\S{200})\S{100,}(\S{100})", r"\1...\2", line)


def verbs() -> dict[str, tuple[str, str]]:
    """{verb: (module, help)}: the files of commands/ and of tasks/ that have a function main.

    The help is the first line of the file's docstring. Nothing is imported.
    """
    found = {}
    here = Path(__file__).parent
    for room in ("commands", "tasks"):
        files = {f.stem: f for f in (here / room).glob("*.py") if f.stem != "__init__"}
        files |= {f.parent.name: f for f in (here / room).glob("*/__init__.py")}
        for name, file in files.items():
            text = file.read_text(encoding="utf-8")
            if re.search(r"^def main\(", text, re.MULTILINE):
                line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
                found[name] = (f"cascade.{room}.{name}", line[:1].lower() + line[1:].rstrip("."))
    ordered = sorted(found, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    return {name: found[name] for name in ordered}


def usage() -> str:
    lines = "\n".join(f"  {verb:<8} {help}" for verb, (_, help) in verbs().items())
    return (
        "usage: cascade VERB ...\n\nText to image by cascaded pixel diffusion.\n\n"
        f"{lines}\n\n`cascade VERB --help` shows what a verb takes, with units and defaults; "
        "`cascade --version` which version this is. Every verb takes --trust MODULE: configs may "
        "then name classes of that module of yours."
    )
