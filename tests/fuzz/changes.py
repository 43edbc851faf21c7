"""What careless and hostile hands do to a file, as hypothesis strategies: bytes -> bytes."""

from __future__ import annotations

import copy
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from tiue_export.bundle.manifest import digest_of

Changes = Callable[[bytes], st.SearchStrategy[bytes]]
Place = tuple[Any, ...]


class Raw(str):
    """JSON text that no value gives: NaN, a number too long, a nesting too deep."""


_DEPTHS = (90, 900, 100_000)
ODD_VALUES: tuple[Any, ...] = (
    *(Raw(text) for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308")),
    *(Raw("9" * digits) for digits in (20, 400, 4_000, 5_000)),
    *(Raw("[" * depth + "]" * depth) for depth in _DEPTHS),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in _DEPTHS),
    *(None, True, False, 0, 1, -1, 2, 3, 64, 1000, 10**6, 10**9, 2**31, 2**63, 2**64, 10**29),
    *(-(10**29), 0.5, -0.0, 1e-300, 1e29, 1.0),
    *("", ".", "..", "/", "/etc/passwd", "../../x", "a\\b", "C:x", "tiue.json", "a/../b", "a/./b"),
    *("x", "[/red]", "[bold]", "[link=https://x]a[/link]", "\ud800", "\ud83d", "\0", "a\0b"),
    *("\x1b[31m", "\r", "\n", "\x07", "\u202e", "\ufeff", "é", "batch", "9" * 5_000, "x" * 5_000),
    *([], {}, [1], [1, 2, 3], ["a"], [[]], [None], [0, 0], [{}], {"a": 1}, {"": ""}, {".": {}}),
    *([1, 4, 8], [1, 4, 8, 8, 8], ["\ud800"], [1e29, -1.5], {"[/red]": "[/red]"}),
)
ODD_TEXTS: tuple[bytes, ...] = (
    *(b"", b" ", b"\0", b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80", b"\xef\xbb\xbf{}", b"{", b"[]"),
    *(b"null", b"3", b'"x"', b"{}", b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000),
    *(b'{"a": 1, "a": 2}', b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    *(b"<!DOCTYPE html>", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\x1f\x8b\x08\0\0\0\0\0"),
)


def places(data: Any, at: Place = ()) -> Iterator[Place]:
    """Every place below the root of a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def _odd(value: Any) -> st.SearchStrategy[Any]:
    """Any odd value, or an odd one of the same type, which the first check lets through."""
    kind = type(value)
    alike = [odd for odd in ODD_VALUES if type(odd) is kind]
    if kind is list and value:
        alike += [value[1:], value + value[:1], value[::-1]]
    return st.one_of(st.sampled_from(ODD_VALUES), st.sampled_from(alike or ODD_VALUES))


@st.composite
def changed_data(draw: Any, data: Any) -> Any:
    """The same JSON value with one or two values replaced, gone, renamed or there twice."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 2))):
        listed = list(places(data))
        if not listed:
            break
        place = draw(st.sampled_from(listed))
        parent = data
        for key in place[:-1]:
            parent = parent[key]
        key, odd = place[-1], copy.deepcopy(draw(_odd(parent[place[-1]])))
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "name", "twice")))
        if how == "drop":
            del parent[key]
        elif isinstance(parent, list) or how == "replace":
            parent[key] = [odd] if how == "twice" else odd
        elif how == "name":
            parent[odd if isinstance(odd, str) else str(odd)[:100]] = parent.pop(key)
        else:
            again = f"{json_text(parent[key])}, {json.dumps(key)}: {json_text(odd)}"
            parent[key] = Raw(again)
    return data


def json_text(data: Any) -> str:
    """JSON as it stands in a file, `Raw` values as they are."""
    if isinstance(data, Raw):
        return str(data)
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {json_text(v)}" for k, v in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(json_text, data)) + "]"
    return json.dumps(data)


@st.composite
def changed_bytes(draw: Any, content: bytes) -> bytes:
    """Bits flipped, the end cut off, bytes put in or taken out; or another file altogether."""
    how = draw(st.sampled_from(("flip", "flip", "cut", "insert", "take", "other")))
    if how == "other" or not content:
        return bytes(draw(st.sampled_from(ODD_TEXTS)))
    at = draw(st.integers(0, len(content) - 1))
    if how == "flip":
        flipped = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            flipped[at] ^= 1 << draw(st.integers(0, 7))
            at = draw(st.integers(0, len(content) - 1))
        return bytes(flipped)
    if how == "cut":
        return content[:at]
    if how == "take":
        return content[:at] + content[at + draw(st.integers(1, 600)) :]
    return content[:at] + draw(st.sampled_from(ODD_TEXTS)) + content[at:]


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a JSON file."""
    structure = changed_data(json.loads(content)).map(lambda data: json_text(data).encode())
    return st.one_of(structure, structure, changed_bytes(content))


def json_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a file with one JSON value a line."""
    rows = [json.loads(line) for line in content.splitlines()]
    return st.one_of(
        changed_data(rows).map(lambda data: "\n".join(map(json_text, data)).encode()),
        changed_bytes(content),
    )


def text_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a text file: its words and cells replaced too."""

    @st.composite
    def structure(draw: Any) -> bytes:
        lines = content.decode().split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        odd = draw(st.sampled_from(ODD_VALUES))
        cells = lines[at].split("\t")
        cells[draw(st.integers(0, len(cells) - 1))] = odd if isinstance(odd, str) else str(odd)
        lines[at] = "\t".join(cells)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return st.one_of(structure(), changed_bytes(content))


def toml_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a TOML file of plain `key = value` lines."""

    @st.composite
    def structure(draw: Any) -> bytes:
        lines = content.decode().splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        odd = draw(st.sampled_from((*ODD_VALUES, Raw("nan"), Raw("inf"), Raw("2020-01-01"))))
        lines[at] = f"{lines[at].partition(' =')[0]} = {json_text(odd)}"
        return "\n".join(lines).encode()

    return st.one_of(structure(), structure(), changed_bytes(content))


def safetensors_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a safetensors file: lies in its header, or damage anywhere."""
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def with_header(data: Any) -> bytes:
        text = json_text(data).encode()
        return struct.pack("<Q", len(text)) + text + rest

    lies = changed_data(header).map(with_header)
    return st.one_of(lies, lies, changed_bytes(content), changed_bytes(content[: 8 + size]))


def single_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a UNet in one file: the configuration in its metadata too."""
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header["__metadata__"]

    def with_config(data: Any) -> bytes:
        changed = {**metadata, "unet_config": json_text(data)}
        text = json.dumps({**header, "__metadata__": changed}).encode()
        return struct.pack("<Q", len(text)) + text + rest

    configured = changed_data(json.loads(metadata["unet_config"])).map(with_config)
    return st.one_of(configured, safetensors_file(content))


def sealed(text: bytes) -> bytes:
    """A manifest's text under the digest that belongs to it, as a careful forger writes it."""
    try:
        data = json.loads(text)
        content = {key: value for key, value in data.items() if key != "sha256"}
        digest = digest_of(content)
    except (ValueError, AttributeError, RecursionError):
        return text
    return text.rstrip()[:-1] + f', "sha256": "{digest}"}}'.encode()


def sealed_manifest(content: bytes) -> st.SearchStrategy[bytes]:
    """Of tiue.json, its digest made right again."""
    data = json.loads(content)
    del data["sha256"]
    return changed_data(data).map(lambda data: sealed(json_text(data).encode()))


_MEMBER_TYPES = (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"g", b"x", b"L", b"K", b"V")
_SPARSE_MAPS: tuple[dict[str, str], ...] = (
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 30},
    {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,x,1"},
    {"GNU.sparse.map": "1,2,3", "GNU.sparse.size": "-1"},
    {"GNU.sparse.size": "x", "GNU.sparse.numblocks": "y"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "\ud800"},
    *({"size": size} for size in ("-1", "x", "9" * 40, "1e9", "")),
    *({"path": path} for path in ("", ".", "..", "/etc/passwd", "a\0b", "x" * 5_000)),
    *({"mtime": number} for number in ("nan", "inf", "9" * 400)),
    *({"hdrcharset": "BINARY", "path": path} for path in ("caf\udce9", "\ud800")),
)


def archive(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a packed bundle: members renamed, resized, of another kind, with odd extended headers."""

    @st.composite
    def structure(draw: Any) -> bytes:
        written = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(content)) as source:
            members = [(member, source.extractfile(member)) for member in source]
            chosen = draw(st.integers(0, len(members) - 1))
            how = draw(st.sampled_from(("name", "kind", "extended", "twice", "gone", "number")))
            for number, (member, stream) in enumerate(members):
                body = stream.read() if stream else b""
                kept = member.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
                if number == chosen:
                    if how == "gone":
                        continue
                    if how == "name":
                        odd = draw(st.sampled_from(ODD_VALUES))
                        member.name = (odd if isinstance(odd, str) else str(odd)[:90]) or "."
                    elif how == "kind":
                        member.type = draw(st.sampled_from(_MEMBER_TYPES))
                        member.linkname = draw(st.sampled_from(("", "tiue.json", "/etc/passwd")))
                    elif how == "extended":
                        written.write(_extended(draw(st.sampled_from(_SPARSE_MAPS))))
                    if how in ("name", "kind"):
                        kept = member.tobuf(tarfile.GNU_FORMAT, errors="surrogatepass")
                    elif how == "number":
                        kept = _damaged_number(draw, bytearray(kept))
                written.write(kept + body + bytes(-len(body) % 512))
                if number == chosen and how == "twice":
                    written.write(kept + body + bytes(-len(body) % 512))
        return written.getvalue() + bytes(1024)

    return st.one_of(structure(), structure(), changed_bytes(content))


def _extended(values: dict[str, str]) -> bytes:
    """A pax extended header for the member behind it."""
    records = b""
    for key, value in values.items():
        body = f" {key}=".encode() + value.encode("utf-8", "surrogatepass") + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        records += str(length).encode() + body
    head = tarfile.TarInfo("./PaxHeaders/x")
    head.type, head.size = tarfile.XHDTYPE, len(records)
    return head.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def _damaged_number(draw: Any, head: bytearray) -> bytes:
    """A header whose size, mode or time is no number, its checksum right again."""
    start, length = draw(st.sampled_from(((100, 8), (124, 12), (136, 12))))
    odd = draw(st.sampled_from((b"x", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"7" * 12)))
    at = len(head) - 512
    head[at + start : at + start + length] = odd[:length].ljust(length, b"\0")
    head[at + 148 : at + 156] = b" " * 8
    head[at + 148 : at + 156] = f"{sum(head[at : at + 512]):06o}\0 ".encode()
    return bytes(head)


def any_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a file whose structure is not ours to change."""
    return changed_bytes(content)


def array_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of an .npy file: its header is a Python literal."""
    length = 10 + struct.unpack("<H", content[8:10])[0]
    literals = (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 99999999999, 99999999999), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4, 8, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f16', 'fortran_order': 1, 'shape': (1.5,), }",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (1, 4, 8, 8), }",
        "(" * 5_000,
        "{'descr': '<U4', 'fortran_order': False, 'shape': (1,), 'shape': (2,)}",
    )
    lies = st.sampled_from(literals).map(
        lambda text: (
            content[:8]
            + struct.pack("<H", len(text) + 1)
            + text.encode()
            + b"\n"
            + content[length:]
        )
    )
    return st.one_of(lies, changed_bytes(content))
