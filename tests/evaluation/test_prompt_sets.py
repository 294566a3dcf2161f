"""Files of prompts as the public sets have them, written by Python's csv and json modules."""

import csv
import hashlib
import json

import pytest

from cascade.errors import UserError
from cascade.evaluation import prompt_sets


def table(path, *rows, mark=",", encoding="utf-8", ending="\r\n"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=mark, lineterminator=ending).writerows(rows)
    return path


def read(path, **columns):
    (found,) = prompt_sets.read([path], **columns)
    return found


def test_drawbench_is_read_with_its_categories(tmp_path):
    rows = [
        ("A red coloured car, parked.", "Colors"),
        ('A sign that says "Hello, World"', "Text"),
        ("A donkey\nplays tug-of-war", "Gary Marcus et al. "),
        ("Ein Hund — 狗", "Reddit"),
    ]
    path = table(tmp_path / "drawbench.csv", ("Prompts", "Category"), *rows, encoding="utf-8-sig")
    found = read(path)
    assert found.format == "csv"
    assert [(p.text, p.category) for p in found.prompts] == [(t, c.strip()) for t, c in rows]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.where.rpartition(" ")[2] for p in found.prompts] == ["2", "3", "4", "6"]


def test_parti_prompts_keep_challenge_and_note(tmp_path):
    head = ("Prompt", "Category", "Challenge", "Note")
    row = ('a logo of "Rumbury", 5\' tall', "Arts", "Imagination", "")
    found = read(table(tmp_path / "PartiPrompts.tsv", head, row, mark="\t", ending="\n"))
    assert found.format == "tsv"
    (one,) = found.prompts
    assert (one.text, one.category, one.fields) == (
        row[0],
        "Arts",
        {"Challenge": "Imagination", "Note": ""},
    )


def test_quotation_marks_inside_values_of_a_tsv_are_letters(tmp_path):
    path = tmp_path / "parti.tsv"
    path.write_text('Prompt\tCategory\tNote\nthe words "Fly" and 5" here\tA\tof "Dogs"\nb\tB\t\n')
    assert [p.text for p in read(path).prompts] == ['the words "Fly" and 5" here', "b"]


def test_json_lines_keep_what_else_they_say_and_the_line_as_it_was(tmp_path):
    value = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats é"}
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps(value), json.dumps({"prompt": " a dog ", "atom_count": 1})]
    path.write_text("\n".join([lines[0], "", lines[1]]), encoding="utf-8")
    one, other = read(path).prompts
    assert (one.text, one.category, one.line) == (value["prompt"], "counting", lines[0])
    assert one.fields == {"include": value["include"]}
    assert (other.text, other.category, other.fields) == ("a dog", None, {"atom_count": 1})
    assert other.where.endswith("line 3")


def test_text_is_a_prompt_a_line_up_to_a_tab(tmp_path):
    path = tmp_path / "color_val.txt"
    path.write_text("\ufeffa red bench, and a cat\n\n  b \tnote\r\nc", encoding="utf-8")
    found = read(path)
    assert found.format == "text" and not found.empty
    assert [p.text for p in found.prompts] == ["a red bench, and a cat", "b", "c"]
    assert {p.category for p in found.prompts} == {None}
    assert found.prompts[1].fields == {"after the tab": "note"}


def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path):
    assert read(table(tmp_path / "a.txt", ("Prompts", "Category"), ("x", "y"))).format == "csv"
    (tmp_path / "b.csv").write_text('{"prompt": "x"}\n')
    assert read(tmp_path / "b.csv").format == "JSON lines"


def test_prompts_of_several_texts_are_in_categories_named_after_them(tmp_path):
    for name in ("color_val", "shape_val"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n")
    table(tmp_path / "t.csv", ("prompt", "category"), ("x", "own"), ("y", ""))
    files = [tmp_path / name for name in ("color_val.txt", "shape_val.txt", "t.csv")]
    found = [p for file in prompt_sets.read(files) for p in file.prompts]
    assert [p.category for p in found] == ["color_val", "shape_val", "own", "t"]


def test_columns_of_other_names_are_named(tmp_path):
    path = table(tmp_path / "a.csv", ("id", "caption", "kind"), ("1", "a cat", "animal"))
    (one,) = read(path, prompt_column="caption", category_column="kind").prompts
    assert (one.text, one.category, one.fields) == ("a cat", "animal", {"id": "1"})
    text = path.rename(tmp_path / "a.txt")
    assert read(text, prompt_column="caption").format == "csv"
    (tmp_path / "b.jsonl").write_text('{"text": "a dog", "kind": "animal"}\n')
    (one,) = read(tmp_path / "b.jsonl", prompt_column="text", category_column="kind").prompts
    assert (one.text, one.category) == ("a dog", "animal")


def test_rows_without_a_prompt_are_passed_over_and_counted(tmp_path):
    rows = ("x", "A"), (" ", "A"), ("", ""), ("y", "B"), ("", "B")
    found = read(table(tmp_path / "a.csv", ("Prompts", "Category"), *rows))
    assert [p.text for p in found.prompts] == ["x", "y"] and found.empty == (3, 6)


HEAD = "Prompts,Category\n"


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.csv", b"id,caption\n1,x\n", "line 1: none of the columns id, caption is called prompt"),
        (
            "a.csv",
            HEAD.encode() + b"a,b,c\n",
            "line 2: has 3 values for the 2 columns Prompts, Cat",
        ),
        ("a.csv", HEAD.encode() + b'x,A\n"a,B\nc,D\n', "line 3: a quotation mark is opened and ne"),
        ("a.csv", b"prompt,prompt\nx,y\n", "two columns are called 'prompt'"),
        ("a.csv", HEAD.encode() + b" ,A\n", "has no prompt"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n3\n', "line 2: must be a JSON object"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', "line 2: none of the columns text is cal"),
        ("a.jsonl", b'{"prompt": 5}\n', "line 1: 'prompt' must be a text, got 5"),
        ("a.jsonl", b'{"prompt": "x", "tag": [1]}\n', "line 1: 'tag' must be a text, got [1]"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: is not JSON"),
        ("a.jsonl", b'{"prompt": "a\\u0000"}\n', "line 1: 'prompt' has a NUL character"),
        ("a.json", b'[{"prompt": "x"}]', "is a JSON list; write its objects one a line"),
        ("a.txt", b"x\ny\0z\n", "line 2: has a NUL character"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "line 1: is not UTF-8 text (byte 0)"),
        ("a.txt", b"ok\nM\xfcller\n", "line 2: is not UTF-8 text (byte 4)"),
        ("a.txt", b"\n \n", "has no prompt"),
        ("a.txt", b"", "has no prompt"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e:
        read(tmp_path / name)
    assert message in str(e.value) and str(tmp_path / name) in str(e.value)
    assert "\n" not in str(e.value)


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path):
    path = table(tmp_path / "a.csv", ("Prompts", "Category"), ("x", "A"))
    with pytest.raises(UserError, match="--prompt-column y: .* no such column; it has Prompts, Ca"):
        read(path, prompt_column="y")
    with pytest.raises(UserError, match="--category-column y: "):
        read(path, category_column="y")
    with pytest.raises(UserError, match="is the column of prompts"):
        read(path, category_column="Prompts")


def test_a_missing_file_is_told_with_where_people_get_the_sets(tmp_path):
    with pytest.raises(UserError) as e:
        read(tmp_path / "drawbench.csv")
    for place in ("shunk031/DrawBench", "google-research/parti", "djghosh13", "Karine-Huang"):
        assert place in str(e.value)
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sets, "MOST_BYTES", 5)
    (tmp_path / "a.txt").write_text("123456")
    with pytest.raises(UserError, match="at most 5 bytes"):
        read(tmp_path / "a.txt")
