"""Public sets of prompts, read from the files that people have of them.

    DrawBench        csv with the columns Prompts, Category           Saharia et al. 2022, sec. 4.1
    PartiPrompts     tsv with the columns Prompt, Category, ...       Yu et al. 2022, "Parti"
    GenEval, 2       JSON lines with "prompt", "tag" and more         Ghosh et al. 2023
    T2I-CompBench    text, one prompt a line, a file for a category   Huang et al. 2023

What a file is shows in its content; only a table whose columns have other names is told from text
by its ending, .csv or .tsv, or by the name of a column that is given.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cascade.errors import UserError
from cascade.storage import paths

Format = Literal["csv", "tsv", "JSON lines", "text"]

MOST_BYTES = 2**25
"""A file of prompts has at most so many bytes."""
PROMPT_COLUMNS = ("prompt", "prompts")
CATEGORY_COLUMNS = ("category", "tag")
"""What columns, and keys of JSON, are called in the public sets; case does not matter."""
SOURCES = (
    "DrawBench: the Imagen authors' sheet, mirrored as shunk031/DrawBench on the Hugging Face hub; "
    "PartiPrompts: PartiPrompts.tsv of github.com/google-research/parti; GenEval: "
    "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval; T2I-CompBench: "
    "examples/dataset of github.com/Karine-Huang/T2I-CompBench"
)
"""Where people get the files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a set."""

    text: str
    """What to draw, without white space around it."""
    category: str | None = None
    """The category that the set puts it in; None where the set has none."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The other things that the set says of it, by their names there, as JSON values."""
    where: str
    """The file and the line in it, as errors name them."""
    line: str | None = None
    """The line as it is in a file of JSON lines; None in other files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
    """One file of prompts."""

    path: Path
    """The file."""
    sha256: str
    """The SHA-256 of its bytes, in hexadecimal."""
    format: Format
    """What it is."""
    prompts: tuple[Prompt, ...]
    """The prompts in their order, one at least."""
    empty: tuple[int, ...]
    """The lines that have no prompt where one should be, which are passed over; empty lines of
    text are none of them."""


def read(
    files: Sequence[Path], *, prompt_column: str | None = None, category_column: str | None = None
) -> list[PromptFile]:
    """Read files of prompts, each of any format.

    prompt_column, category_column: the columns of tables, or keys of JSON lines, that hold them;
    None takes those that have the names of the public sets. Of several files, the prompts that are
    in no category come into one with the name of their file, as T2I-CompBench has it. Raises
    UserError for a file that is missing or no text, for lines that cannot be read, and for columns
    that are not there.
    """
    found = [_read(path, prompt_column, category_column) for path in files]
    if len(found) == 1:
        return found
    return [
        dataclasses.replace(
            one,
            prompts=tuple(
                dataclasses.replace(prompt, category=prompt.category or one.path.stem)
                for prompt in one.prompts
            ),
        )
        for one in found
    ]


def _read(path: Path, prompt_column: str | None, category_column: str | None) -> PromptFile:
    content = _content(path)
    lines = _lines(path, content)
    columns = (prompt_column, category_column)
    empty: list[int] = []
    kind = _format(path, lines, given=any(columns))
    if kind == "JSON lines":
        prompts = list(_json_lines(path, lines, columns, empty))
    elif kind == "text":
        prompts = list(_text(path, lines))
    else:
        prompts = list(_table(path, lines, "," if kind == "csv" else "\t", columns, empty))
    if not prompts:
        raise UserError(f"{path}: has no prompt; a set has one at least")
    return PromptFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        format=kind,
        prompts=tuple(prompts),
        empty=tuple(empty),
    )


def _content(path: Path) -> bytes:
    paths.check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {SOURCES}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give a file of prompts") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: must have at most {MOST_BYTES} bytes; draw it in several parts")
    return content


def _lines(path: Path, content: bytes) -> list[str]:
    """The lines of a text, with what ends each."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise UserError(
            f"{path}, line {line}: is not UTF-8 text (byte {e.start}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: has a NUL character, which no text has; give a text")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _format(path: Path, lines: Sequence[str], given: bool) -> Format:
    """given: whether the name of a column is, which text has not."""
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        return "JSON lines"
    if first.strip() == "[" or first.lstrip().startswith(("[{", '["')):
        raise UserError(f"{path}: is a JSON list; write its objects one a line")
    kind: Format = "tsv" if "\t" in first else "csv"
    header = [name.strip().lower() for name in next(csv.reader([first], delimiter=_MARK[kind]))]
    named = any(name in PROMPT_COLUMNS for name in header)
    if given or named or path.suffix.lower() in (".csv", ".tsv"):
        return kind
    return "text"


_MARK = {"csv": ",", "tsv": "\t"}


def _text(path: Path, lines: Sequence[str]) -> Iterator[Prompt]:
    """A prompt ends at a tab, as T2I-CompBench's own reader has it."""
    for number, line in enumerate(lines, 1):
        text, _, rest = line.partition("\t")
        if text.strip():
            fields = {"after the tab": rest.strip()} if rest.strip() else {}
            yield Prompt(text=text.strip(), fields=fields, where=f"{path}, line {number}")


def _json_lines(
    path: Path, lines: Sequence[str], columns: tuple[str | None, str | None], empty: list[int]
) -> Iterator[Prompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: is not JSON ({e}); each line must be an object") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a JSON object, with a prompt, as the other lines")
        prompt, category = _columns(where, list(value), columns)
        text, kind = value.pop(prompt), value.pop(category) if category else None
        for name, said in ((prompt, text), (category, kind)):
            if not isinstance(said, str | None) or (said is None and name == prompt):
                raise UserError(f"{where}: {name!r} must be a text, got {json.dumps(said)}")
            if "\0" in (said or ""):
                raise UserError(f"{where}: {name!r} has a NUL character, which no text has")
        if not text.strip():
            empty.append(number)
            continue
        yield Prompt(
            text=text.strip(),
            category=(kind or "").strip() or None,
            fields=value,
            where=where,
            line=line.strip("\n"),
        )


def _table(
    path: Path,
    lines: Sequence[str],
    mark: str,
    columns: tuple[str | None, str | None],
    empty: list[int],
) -> Iterator[Prompt]:
    header: list[str] = []
    prompt, category = "", None
    for begin, row in _rows(path, lines, mark):
        where = f"{path}, line {begin}"
        if not header:
            header = [name.strip() for name in row]
            prompt, category = _columns(where, header, columns)
            continue
        if len(row) != len(header):
            raise UserError(
                f"{where}: has {len(row)} value{'s' * (len(row) != 1)} for the {len(header)} "
                f"columns {', '.join(header)}; a value that holds the mark between columns, or a "
                'quotation mark, stands in "quotation marks"'
            )
        values = dict(zip(header, row, strict=True))
        text, kind = values.pop(prompt).strip(), values.pop(category) if category else ""
        if not text:
            empty.append(begin)
            continue
        yield Prompt(text=text, category=kind.strip() or None, fields=values, where=where)


def _rows(path: Path, lines: Sequence[str], mark: str) -> Iterator[tuple[int, list[str]]]:
    """(the line on which it begins, the values) of every row that has any."""
    reader, begin = csv.reader(lines, delimiter=mark), 1
    try:
        for row in reader:
            raw = "".join(lines[begin - 1 : reader.line_num])
            if raw.strip("\n").count("\n") and raw.count('"') % 2:
                raise UserError(
                    f"{path}, line {begin}: a quotation mark is opened and never closed"
                )
            if any(value.strip() for value in row):
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"{path}, line {begin}: {e}; save it as a table anew") from None


def _columns(
    where: str, there: Sequence[str], given: tuple[str | None, str | None]
) -> tuple[str, str | None]:
    """The names of the columns of prompts and of categories, the second if there is one."""
    if twice := sorted({name for name in there if there.count(name) > 1}):
        raise UserError(f"{where}: two columns are called {twice[0]!r}; give each its own name")
    listed = ", ".join(there)
    flags = ("--prompt-column", "--category-column")
    for flag, name in zip(flags, given, strict=True):
        if name is not None and name not in there:
            raise UserError(f"{flag} {name}: {where} has no such column; it has {listed}")
    prompt, category = given
    known = {name.lower(): name for name in reversed(there)}
    if prompt is None:
        prompt = next((known[name] for name in PROMPT_COLUMNS if name in known), None)
    if prompt is None:
        raise UserError(
            f"{where}: none of the columns {listed} is called prompt; say with --prompt-column "
            "which of them it is"
        )
    if category is None:
        category = next((known[name] for name in CATEGORY_COLUMNS if name in known), None)
    if category == prompt:
        raise UserError(f"--category-column {category}: is the column of prompts; name another")
    return prompt, category
