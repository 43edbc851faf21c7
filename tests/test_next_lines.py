"""Every `next:` line of the program: its commands exist, its options are those of who prints it."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

from next_lines import mistakes

from tiue_export import errors

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for top in ("tiue_export", "apps", "runtimes", "calibration", "benchmarks")
    for path in sorted((ROOT / top).rglob("*.py"))
]
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
# Where in their arguments other functions take a next line.
OTHERS = {"_stop": 1, "refuse": 1, "Refusal": 3, "require_passed": 1, "full_disk": 1}
EXPORTS = ("onnx", "openvino", "trt", "coreml", "coreai")
# Who prints what a file raises, where that is not any verb: all of them must have its options.
PRINTED_BY = {
    "apps/export/refit.py": ("trt",),
    "apps/export/trt.py": ("trt",),
    "apps/options/checkpoint.py": EXPORTS,
    "apps/options/graphs.py": EXPORTS,
    "apps/draw/bulk": ("generate",),
    "apps/draw/generate.py": ("generate",),
    "apps/server": ("serve",),
    "apps/studio": ("studio",),
    "apps/quantize.py": ("quantize",),
    "apps/calibrate.py": ("calibrate",),
    "apps/analyze.py": ("analyze",),
    "apps/bench.py": ("bench",),
    "apps/init.py": ("init",),
    "apps/demo.py": ("demo",),
    "apps/distill.py": ("distill",),
    "benchmarks/latency": ("bench",),
    "calibration/capture.py": ("calibrate",),
    "calibration/quantize.py": ("quantize",),
    "calibration/verdict.py": ("quantize",),
    "tiue_export/export/coreml": ("coreml",),
    "tiue_export/export/openvino.py": ("openvino",),
    "tiue_export/export/triton": ("triton",),
    "tiue_export/export/trt": ("trt",),
    "tiue_export/methods": EXPORTS,
    "tiue_export/graphs": EXPORTS,
    "tiue_export/student/load.py": (*EXPORTS, "audit", "analyze"),
    "tiue_export/train": ("distill",),
}
PROGRAMS_OF_THEIR_OWN = ("benchmarks/quality", "benchmarks/studies")


def texts(node: ast.AST | None, names: dict[str, ast.AST]) -> list[str]:
    """The texts that an expression may be, with X for what only a run knows."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(each) for each in itertools.product(*(texts(p, names) for p in parts))]
        case ast.FormattedValue(value=value):
            return texts(value, names) or ["X"]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            sides = (texts(left, names) or ["X"], texts(right, names) or ["X"])
            return ["".join(each) for each in itertools.product(*sides)]
        case ast.IfExp(body=body, orelse=other):
            return [*texts(body, names), *texts(other, names)]
        case ast.Name(id=name) if name in names:
            return texts(names[name], names)
        case ast.Call(func=ast.Name(id="command_line"), args=arguments):
            words = [" ".join(texts(each, names)) or "X" for each in arguments]
            return [" ".join(("tiue-export", *words))]
    return []


def next_lines() -> Iterator[tuple[str, int, str]]:
    """File, line and text of every next line that stands in the sources."""
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        names = {
            target.id: each.value
            for each in ast.walk(tree)
            if isinstance(each, ast.Assign | ast.AnnAssign) and each.value is not None
            for target in (each.targets if isinstance(each, ast.Assign) else [each.target])
            if isinstance(target, ast.Name)
        }
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            for each in given_next(node):
                for text in texts(each, names):
                    yield place, node.lineno, text


def given_next(node: ast.AST) -> list[ast.AST]:
    """The expressions that a node gives for what to type next."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            if name in ERRORS or name in OTHERS:
                index = OTHERS.get(name, 1)
                return [*node.args[index : index + 1]] + [
                    each.value for each in node.keywords if each.arg == "next_step"
                ]
        case ast.FunctionDef(name="if_lost"):
            return [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
    return []


def printed_by(place: str) -> tuple[str, ...]:
    return next((who for start, who in PRINTED_BY.items() if place.startswith(start)), ())


def test_every_next_line_names_commands_and_options_of_who_prints_it() -> None:
    found = [each for each in next_lines() if not each[0].startswith(PROGRAMS_OF_THEIR_OWN)]
    assert len(found) > 300
    wrong = [
        f"{place}:{line}: {text!r}: {problem}"
        for place, line, text in found
        for problem in mistakes(text, *printed_by(place))
    ]
    assert wrong == []
