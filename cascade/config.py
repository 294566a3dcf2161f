"""Configurations: frozen dataclasses, written in Python files, saved as JSON, overridden by tyro.

A config file is a Python file with a function `config()` that returns a dataclass; if it takes
arguments, they come from the command line. Files are only run when a person names them (`cascade
train FILE`).

A config builds its own thing: a field typed `Schedule` or `NetworkConfig` holds any dataclass that
subclasses it, of this package or of a module of the reader's. What is stored beside weights is
JSON, in which an object's `type` is the qualified name of its class. Reading it imports nothing but
modules of this package; any other module must have been imported already, as `--trust MODULE` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cascade.errors import UserError
from cascade.ranges import shown

T = TypeVar("T")
MOST_JSON = 2**26
"""Bytes of the largest JSON file that is read."""
MOST_INT = 2**63
"""A whole number of a config is below this; no count of anything is not."""


def load(path: str) -> Any:
    """Run a config file and return what its `config()` returns."""
    return load_with(path, ())[0]


def load_with(path: str, words: Sequence[str]) -> tuple[Any, list[str]]:
    """What a config file's function returns, given its arguments from the command line.

    `def config(init: str)` is called with the VALUE of `--init VALUE`. Also returns the words that
    are left. Raises UserError for an argument without a default that is missing.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise UserError(f"config {path}: is no regular file; give the path of a Python file")
    if not file.is_file():
        raise UserError(
            f"config {path}: no such file; give the path of one, as configs/tiny/base64.py"
        )
    try:
        names = runpy.run_path(str(file))
    except SyntaxError as e:
        where = "" if e.lineno is None else f", line {e.lineno}"
        raise UserError(f"config {path}{where}: {e.msg}") from None
    except (ImportError, UserError) as e:
        raise UserError(f"config {path}: {e}") from None
    except (Exception, SystemExit) as e:
        raise UserError(f"config {path}, line {_line(e, path)}: {type(e).__name__}: {e}") from None
    if not callable(names.get("config")):
        raise UserError(f"config {path}: defines no function config(); it must return the config")
    given, rest, missing = {}, list(words), []
    for name, parameter in inspect.signature(names["config"]).parameters.items():
        flag = f"--{name.replace('_', '-')}"
        value, rest = take(rest, flag)
        if value is not None:
            given[name] = value
        elif parameter.default is inspect.Parameter.empty:
            missing.append(flag)
    if missing and {"-h", "--help"} & set(rest):
        print(inspect.cleandoc(names.get("__doc__") or ""))
        print(
            f"\n{path} needs {', '.join(missing)}: with a value for each, --help lists its fields."
        )
        raise SystemExit(0)
    if missing:
        raise UserError(f"config {path}: {missing[0]} is missing; see the head of that file")
    try:
        return names["config"](**given), rest
    except TypeError as e:  # an unknown or missing field of a dataclass
        raise UserError(f"config {path}: {_with_nearest_field(str(e), names)}") from None
    except ValueError as e:
        raise UserError(f"config {path}: {e}") from None
    except (Exception, SystemExit) as e:  # whatever the function raises
        raise UserError(f"config {path}, line {_line(e, path)}: {type(e).__name__}: {e}") from None


def take(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Cut `flag VALUE` or `flag=VALUE` out of the words: (VALUE or None, the others).

    Raises UserError where it has no value, or is given twice.
    """
    values, rest = take_all(words, flag)
    if len(values) > 1:
        raise UserError(f"{flag} is given {len(values)} times ({', '.join(values)}); give it once")
    return (values[0] if values else None), rest


def take_all(words: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Cut all `flag VALUE` and `flag=VALUE` out of the words: (the values, the others)."""
    values, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        elif word != flag:
            rest.append(word)
        elif left:
            values.append(left.pop(0))
        else:
            raise UserError(f"{flag} needs a value")
    return values, rest


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    default: T | None = None,
    prog: str,
    description: str | None = None,
) -> T:
    """Command-line words -> an instance of `cls`; a mistake becomes a one-line UserError.

    default: the values that the words override, field by field (`--stage.network.levels.0.width`).
    """
    import tyro

    err = io.StringIO()
    with_default: dict[str, Any] = {} if default is None else {"default": default}
    try:
        out: Any = _Unmarked(sys.stdout)
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            return tyro.cli(
                cls,
                args=[str(a) for a in argv],
                prog=prog,
                description=_wrapped(description or cls.__doc__ or ""),
                config=(tyro.conf.AvoidSubcommands,),
                registry=_reflowing(),
                **with_default,
            )
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(f"{prog}: {_one_line(err.getvalue())}") from None
    except UserError:
        raise
    except (ValueError, TypeError) as e:  # a dataclass refused its values
        raise UserError(f"{prog}: {e}") from None


_MARK = "\u2060"  # WORD JOINER, which has no width

trusted: list[str] = []
"""Modules that `trust` has imported."""


def trust(module: str) -> None:
    """Import a module of the reader's, whose config classes JSON may then name.

    It is looked for where Python looks, and in the current folder. Raises UserError without it.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"--trust {module}: {e}; name a module that lies here or is installed, without .py"
        ) from None
    except Exception as e:  # whatever the module raises
        raise UserError(f"--trust {module}: {type(e).__name__}: {e}") from None
    trusted.append(module)


def to_json(config: Any) -> Any:
    """A dataclass -> plain JSON values; each object carries its class's name under `type`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if type(config).__module__ == "<run_path>":
            raise UserError(
                f"{type(config).__name__} is a class of the config file, which cannot be read back "
                "from what is saved: put it in a module beside that file, import it there, and add "
                "--trust MODULE"
            )
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{type(config).__module__}.{type(config).__qualname__}", **fields}
    if isinstance(config, (list, tuple)):
        return [to_json(v) for v in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"a config may hold numbers, text, tuples and dataclasses, not {config!r}")


def from_json(cls: Any, value: Any, where: str = "config") -> Any:
    """The inverse of `to_json` for an expected type, with every name and type checked.

    Raises UserError naming the field; for an unknown field, the nearest known one.
    """
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return _from_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise UserError(f"{where} must have {len(args)} values, got {len(value)}")
        return tuple(
            from_json(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if dataclasses.is_dataclass(cls):
        return _from_object((cls,), value, where)
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} must be a float, got {shown(value)}") from None
    if cls is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, got {value!r}")
    if cls is int and type(value) is int and abs(value) >= MOST_INT:
        raise UserError(f"{where} must be below 2^63, got {shown(value)}")
    if not isinstance(value, cls) or (isinstance(value, bool) and cls is not bool):
        raise UserError(f"{where} must be {cls.__name__}, got {value!r}")
    return value


def check(config: Any, where: str) -> None:
    """Raise UserError unless every field has a value of its type, as `from_json` would.

    Python checks none of what a config file gives to a dataclass. NaN and infinity are numbers to
    Python and to JSON as it reads it, and no setting.
    """
    try:
        value = to_json(config)
    except TypeError as e:
        raise UserError(f"{where}: {e}") from None
    from_json(type(config), value, where)


def read_json(path: Any) -> Any:
    """Parse a JSON file, here or in a bucket.

    Raises UserError when it is missing, is not JSON, or has more than MOST_JSON bytes.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; it must be a JSON file")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_JSON + 1)
        if len(content) > MOST_JSON:
            raise UserError(f"{path}: has more than the {MOST_JSON} bytes of the largest JSON file")
        return json.loads(content.decode())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); it may be damaged") from None


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint such as ` (did you mean 'width'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _from_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    if len(options) == 1:
        return from_json(options[0], value, where)
    classes = tuple(o for o in options if dataclasses.is_dataclass(o))
    if classes and isinstance(value, dict):
        return _from_object(classes, value, where)
    for option in options:
        with contextlib.suppress(UserError):
            return from_json(option, value, where)
    raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, options))}")


def _from_object(expected: tuple[Any, ...], value: Any, where: str) -> Any:
    """expected: classes, one of which it must be."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a {_names(expected)}, got {value!r}"[:200])
    if "type" in value or len(expected) > 1:
        cls: Any = _class_named(value.get("type"), expected, where)
    else:
        cls = next(iter(expected))
        if cls.__subclasses__():
            raise UserError(f"{where} must have a type, which names a kind of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    fields = {k: v for k, v in value.items() if k != "type"}
    for name in fields:
        if name not in known:
            raise UserError(f"{where}: {cls.__name__} has no field {name!r}{nearest(name, known)}")
    try:
        return cls(**{k: from_json(hints[k], v, f"{where}.{k}") for k, v in fields.items()})
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{where[:80]}: is nested too deeply; write it flatter") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{where}: {e}") from None


def _class_named(name: Any, expected: tuple[Any, ...], where: str) -> type:
    """The frozen dataclass of that qualified name, if it is what the field expects."""
    module, _, cls_name = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if module and not _may_be_imported(module):
        raise UserError(
            f"{where}.type names {name!r}, and reading a file imports no code but cascade's own; "
            f"if you trust that module, add --trust {module} (in Python, import it)"
        )
    cls: Any = None
    if module:
        with contextlib.suppress(ImportError):
            # Not getattr, for which a module may have code of its own that imports others.
            cls = vars(importlib.import_module(module)).get(cls_name)
    if isinstance(cls, type) and issubclass(cls, expected) and dataclasses.is_dataclass(cls):
        kind: Any = cls
        if kind.__dataclass_params__.frozen:
            return kind
    raise UserError(
        f"{where}.type must be the qualified name of a {_names(expected)}, got {name!r}"
    )


def _names(classes: tuple[Any, ...]) -> str:
    return " or ".join(cls.__name__ for cls in classes)


def _may_be_imported(module: str) -> bool:
    """Whether it is a module of this package, or one that somebody has imported already."""
    if module in sys.modules:
        return True
    package, *parts = module.split(".")
    if package != __package__ or not all(re.fullmatch(r"[a-z][a-z0-9_]*", p) for p in parts):
        return False
    file = Path(__file__).parent.joinpath(*parts)
    return file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()


def _reflowing() -> Any:
    """tyro's own rules, but that a path may not be empty, which Python takes for `.`, that help is
    reflowed (tyro keeps a docstring's newlines), and that None and () read well in it."""
    import tyro
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
    )

    registry, asking = ConstructorRegistry(), False
    none = tyro.conf.arg(help_behavior_hint="(default: none)")

    def flowed(help: Any) -> str | None:
        text: Any = help() if callable(help) else help
        return text and "\n\n".join(" ".join(p.split()) for p in text.split("\n\n"))

    @registry.primitive_rule
    def path_rule(info: Any) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: _path(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def optional_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        nonlocal asking
        if asking or type(None) not in typing.get_args(info.type):
            return None
        asking = True
        try:
            spec = registry.get_primitive_spec(info)
        finally:
            asking = False
        if not isinstance(spec, PrimitiveConstructorSpec) or not isinstance(spec.metavar, str):
            return None
        metavar = re.sub(r"^\{None\}\|(.*)$", r"\1|None", spec.metavar)
        return dataclasses.replace(spec, metavar=metavar)

    @registry.struct_rule
    def rule(info: Any) -> StructConstructorSpec | None:
        nonlocal asking
        if asking:
            return None  # which leaves it to tyro's rules
        asking = True
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = [
            dataclasses.replace(
                f,
                helptext=functools.partial(flowed, f.helptext),
                type=typing.Annotated[f.type, none] if f.default == () else f.type,
            )
            for f in spec.fields
        ]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _path(word: str) -> Path:
    if not word:
        raise ValueError("the path is empty; write . for this folder")
    return Path(word)


def _with_nearest_field(message: str, names: dict[str, Any]) -> str:
    """Python's message about an unknown field, with the nearest known one added."""
    found = re.search(
        r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", message
    )
    if not found:
        return message
    classes = [c for c in names.values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    classes = [c for c in classes if c.__name__ == found[1]] or classes
    known = [f.name for c in classes for f in dataclasses.fields(c)]
    return f"{found[1] or 'a class'} has no field {found[2]!r}{nearest(found[2], known)}"


def _line(error: BaseException, path: str) -> int | None:
    """The last line of that file which led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if Path(f.filename) == Path(path)), None)


def _one_line(text: str) -> str:
    """tyro's boxed message as one line: what was wrong, and the nearest option if it names one."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if "Missing from" in text:
        absent, _, unknown = text.partition("Unrecognized options:")
        named = re.compile(r"^[│|] {5}((?:--)?[A-Za-z]\S*(?: [A-Z]+)?)\s*[│|]$", re.MULTILINE)
        if words := named.findall(absent):
            more = [word for word in named.findall(unknown) if word.startswith("--")]
            message = f"{_and(words)} {'is' if len(words) == 1 else 'are'} missing"
            return message + (f", and {_and(more)} unknown" if more else "") + "; see --help"
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"^([╭╰━┌└]|-+$|For full help)", line)]
    sections = " ".join("\0" if re.match(r"^─+$", line) else line for line in lines).split("\0")
    message = sections[0].strip() or "cannot understand these arguments"
    # The words of Python and of tyro's types, for a person.
    for refusal, what in (
        (r"invalid literal for int\(\).*?", "a whole number"),
        (r"could not convert string to float", "a number"),
    ):
        if number := re.search(rf"parsing (--\S+):.*?{refusal}: ('[^']*')", message):
            message = f"{number[1]} must be {what}, got {number[2]}"
    message = re.sub(r"Error parsing (--\S+): ", r"\1: ", message)
    message = re.sub(r"Error parsing \S+: ", "", message).replace(").", ")")
    message = message.replace(", 'None'", "")
    choice = re.search(r"invalid choice (.*) for argument '(--\S+)'. .* one of \((.*)\)", message)
    if choice:
        known = _and([w for w in re.findall(r"'([^']*)'", choice[3]) if w != "None"], "or")
        message = f"{choice[2]} must be {known}, got {choice[1]}"
    bare = re.search(r"Missing value for argument '(\S+)'", message)
    if bare:
        message = f"{bare[1]} needs a value"
    unknown, _, words = message.partition("Unrecognized options: ")
    if not unknown and words:
        options = re.findall(r"(?:^|, )(--?[A-Za-z][^\s,]*)", words)
        if options:
            message = f"unknown option{'s' * (len(options) > 1)} {_and(options)}"
        else:
            message = f"more words than it takes: {words}; words that belong together need quotes"
    close = re.search(r"(?:Perhaps you meant|similar to --\S+):.*?(--[\w.-]+)", text, re.DOTALL)
    return message + (f" (did you mean {close[1]}?)" if close else "; see --help")


def _wrapped(text: str) -> str:
    """A docstring's paragraphs, as wide as the boxes of options below them.

    tyro joins lines that begin with a letter: all but the first of a paragraph begin with _MARK,
    which `_Unmarked` takes away.
    """
    width = min(shutil.get_terminal_size().columns, 80)
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(text).split("\n\n")]
    lines: Any = {"subsequent_indent": _MARK, "break_long_words": False}
    return "\n\n".join(textwrap.fill(p, width, **lines) for p in paragraphs)


class _Unmarked:
    """A stream without _MARK, and else as it is."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.replace(_MARK, ""))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _and(words: Sequence[str], between: str = "and") -> str:
    return f" {between} ".join(p for p in (", ".join(words[:-1]), words[-1]) if p)
