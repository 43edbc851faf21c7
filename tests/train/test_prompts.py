"""Training prompts: five formats, one order, and what is said of a file that holds none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tiue_export.errors import MissingExtraError, UsageError
from tiue_export.system.install import install_line
from tiue_export.train.prompts import read_prompts

PROMPTS = ["a red fox", "an owl", 'a sign that says "no, thanks"', "ein Käuzchen"]
FORMATS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")


def write(file: Path, prompts: list[str | None], column: str = "prompt") -> Path:
    """`prompts` as one column of a file in the format that its suffix says."""
    texts = ["" if prompt is None else prompt for prompt in prompts]
    if file.suffix == ".txt":
        file.write_text("\n".join(texts) + "\n", "utf-8")
    elif file.suffix == ".tsv":
        rows = [f"{number}\t{text}\tAnimals" for number, text in enumerate(texts)]
        file.write_text("\n".join([f"id\t{column}\tCategory", *rows]) + "\n", "utf-8")
    elif file.suffix == ".csv":
        quoted = [text.replace('"', '""') for text in texts]
        rows = [f'{number},"{text}"' for number, text in enumerate(quoted)]
        file.write_text("\n".join([f"id,{column}", *rows]) + "\n", "utf-8")
    elif file.suffix == ".jsonl":
        entries = [{"id": number, column: text} for number, text in enumerate(prompts)]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    else:
        table = pyarrow.table({"id": list(range(len(prompts))), column: prompts})
        parquet.write_table(table, file)
    return file


def refused(file: Path, column: str | None = None) -> str:
    """The message and the next step of the error that reading ends with."""
    with pytest.raises(UsageError) as caught:
        read_prompts(file, column)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_prompts_in_the_same_order(suffix, tmp_path):
    expected = read_prompts(write(tmp_path / "all.txt", PROMPTS))
    assert sorted(expected) == sorted(PROMPTS)
    assert read_prompts(write(tmp_path / f"prompts{suffix}", PROMPTS)) == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_prompts_and_duplicates_are_dropped_whatever_the_spaces(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["a cat", "", " a cat ", "  ", None, "a dog", "a cat"])
    assert sorted(read_prompts(file)) == ["a cat", "a dog"]


def test_the_order_is_shuffled_and_does_not_depend_on_that_of_the_file(tmp_path):
    many = [f"prompt {number:03d}" for number in range(100)]
    forth = read_prompts(write(tmp_path / "forth.txt", many))
    assert forth != many
    assert sorted(forth) == many
    assert read_prompts(write(tmp_path / "back.txt", many[::-1])) == forth


def test_the_order_is_the_same_in_a_process_with_other_hashes(tmp_path):
    file = write(tmp_path / "p.txt", PROMPTS)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from tiue_export.train.prompts import read_prompts\n"
        "print(json.dumps(read_prompts(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == read_prompts(file)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")))))
@settings(max_examples=30, database=None, deadline=None)
def test_every_line_of_a_text_file_that_says_something_is_there_once(tmp_path_factory, lines):
    file = write(tmp_path_factory.mktemp("p") / "p.txt", ["one", *lines])
    prompts = read_prompts(file)
    assert len(prompts) == len(set(prompts))
    assert set(prompts) == {"one", *(line.strip() for line in lines)} - {""}


def test_a_tsv_as_partiprompts_publishes_it_keeps_its_quotes_and_commas(tmp_path):
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        'a "Keep Out" sign\tAbstract\tWriting & Symbols\tquotes',
        '"Hello", said the owl\tAnimals\tBasic\tstarts with one',
        "a tall, green cactus\tWorld Knowledge\tSimple Detail",
    ]
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text("\n".join(rows) + "\n", "utf-8")
    expected = ['"Hello", said the owl', 'a "Keep Out" sign', "a tall, green cactus"]
    assert sorted(read_prompts(file)) == expected


def test_a_csv_quotes_its_fields(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text(
        'caption\n"a tall, green cactus"\n"a ""Keep Out"" sign"\n"two\nlines"\n', "utf-8"
    )
    expected = ['a "Keep Out" sign', "a tall, green cactus", "two\nlines"]
    assert sorted(read_prompts(file)) == expected


@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".csv", ".jsonl"])
def test_the_mark_that_windows_programs_put_in_front_is_no_part_of_the_text(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["an owl"])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_prompts(file) == ["an owl"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["Prompt", "caption", "TEXT"])
def test_a_column_with_a_usual_name_is_found(suffix, column, tmp_path):
    assert read_prompts(write(tmp_path / f"p{suffix}", ["an owl"], column)) == ["an owl"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_a_column_with_another_name_is_read_when_it_is_named(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["an owl"], "beschreibung")
    assert read_prompts(file, "beschreibung") == ["an owl"]


def test_dots_reach_into_the_objects_of_a_jsonl(tmp_path):
    file = tmp_path / "train_anno.jsonl"
    entries = [
        {"Task2": {"Caption": "an owl"}},
        {"Task2": {}},
        {"Task2": None},
        {"other": 1},
        {"Task2": {"Caption": None}},
        {"Task2": {"Caption": "a cat"}},
    ]
    file.write_text("\n\n".join(map(json.dumps, entries)), "utf-8")
    assert sorted(read_prompts(file, "Task2.Caption")) == ["a cat", "an owl"]


# What is refused


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "none.txt") == f"{tmp_path}/none.txt is not there"
    assert refused(tmp_path / "none.parquet") == f"{tmp_path}/none.parquet is not there"


def test_another_kind_of_file_is_refused_naming_the_kinds_that_are_read(tmp_path):
    file = tmp_path / "prompts.xlsx"
    file.write_bytes(b"PK")
    assert refused(file) == f"{file} is not .txt, .tsv, .csv, .jsonl, .parquet"


def test_a_folder_and_text_in_another_encoding_cannot_be_read(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert refused(tmp_path / "folder.txt").endswith(
        "Is a directory: '" + str(tmp_path) + "/folder.txt'"
    )
    (tmp_path / "latin.txt").write_bytes("ein Käuzchen".encode("latin-1"))
    assert "latin.txt cannot be read: 'utf-8' codec can't decode byte 0xe4" in refused(
        tmp_path / "latin.txt"
    )


def test_a_csv_that_python_cannot_parse_cannot_be_read(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("prompt\n" + "a" * 200_000 + "\n", "utf-8")
    assert refused(file) == f"{file} cannot be read: field larger than field limit (131072)"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_without_a_single_prompt_is_refused(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["", "  "])
    assert refused(file) == f"{file} holds no prompt"


def test_a_named_field_that_no_line_has_is_named(tmp_path):
    file = write(tmp_path / "p.jsonl", ["an owl"])
    assert refused(file, "Task2.Caption") == f"{file} holds no prompt in 'Task2.Caption'"


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_a_named_column_that_is_not_there_is_refused_listing_those_that_are(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["an owl"])
    assert refused(file, "promt").startswith(f"{file} has no column 'promt'; it has: id, prompt")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_without_a_usual_column_the_setting_that_names_one_is_given(suffix, tmp_path):
    file = write(tmp_path / f"p{suffix}", ["an owl"], "words")
    message = refused(file)
    assert message.startswith(
        f"{file} has no column named prompt, caption, text; it has: id, words"
    )
    assert message.endswith('prompt_column = "NAME" in a configuration.')


def test_an_empty_table_has_no_column(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"")
    assert "it has: none" in refused(tmp_path / "p.csv")


def test_lines_that_are_no_json_objects_are_numbered(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "an owl"}\n{"prompt": \n', "utf-8")
    assert refused(file).startswith(f"{file}:2 is not JSON: Expecting value")
    file.write_text('\n["an owl"]\n', "utf-8")
    assert refused(file) == f"{file}:2 is not a JSON object"


def test_a_value_that_is_not_text_is_shown(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": ["an", "owl"]}\n', "utf-8")
    assert refused(file) == f"{file}:1 has a prompt that is not text: ['an', 'owl']"
    table = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": [7, 8]}), table)
    assert refused(table) == f"{table} has a prompt that is not text: 7"


def test_what_is_not_parquet_is_refused(tmp_path):
    file = tmp_path / "p.parquet"
    file.write_bytes(b"no such thing")
    assert refused(file).startswith(f"{file} is not parquet: Parquet magic bytes not found")


def test_without_pyarrow_reading_parquet_says_what_to_install(tmp_path, monkeypatch):
    file = write(tmp_path / "p.parquet", ["an owl"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError) as caught:
        read_prompts(file)
    assert caught.value.message == "reading parquet needs pyarrow"
    assert caught.value.next_step == install_line("train")
