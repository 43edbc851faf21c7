"""JSON and names that others wrote: read strictly, or refused with the reason."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiue_export.system.file_name import is_file_name, is_path_below
from tiue_export.system.json_file import MAX_DEPTH, parse_json, read_json

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(database=None, deadline=None, max_examples=50)
@given(VALUES)
def test_what_json_can_hold_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is no number that JSON knows"),
        ('{"a": [-Infinity]}', "-Infinity is no number that JSON knows"),
        ('{"a": 1e999}', "a number is larger than any that a computer holds"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object"),
        (r'{"a": "\ud800"}', r"'\ud800' is no text: it holds half a character"),
        (r'{"\udfff": 1}', r"'\udfff' is no text: it holds half a character"),
        ("[" * 100 + "]" * 100, f"it is nested more than {MAX_DEPTH} deep"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("9" * 5_000, "Exceeds the limit"),
        ("{", "Expecting property name"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert reason in str(caught.value)


def test_a_file_of_other_bytes_and_a_named_pipe_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "caf\xe9"}')
    with pytest.raises(ValueError, match="can't decode byte 0xe9"):
        read_json(tmp_path / "a.json")
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(ValueError, match="it is no file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("name", ["model.onnx", "a/b.bin", "unet/model.onnx.data", "é", ".x"])
def test_a_plain_path_below_a_folder_is_taken(name):
    assert is_path_below(name)
    assert is_file_name(name) is ("/" not in name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "/a", "../a", "a/../b", "a/./b", "a//b", "a/", "./a"),
        *("a\\b", "C:a", "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 300, "a/" * 600 + "b"),
        *(None, 3, ["a"]),
    ],
)
def test_no_other_spelling_is(name):
    assert not is_path_below(name)
    assert not is_file_name(name)
