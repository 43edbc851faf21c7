"""Every `next:` line of the program: its commands exist, its options are those of who prints it."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from next_lines import VERBS, mistakes, split, verb_of

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
    """The texts that an expression may be, with 1 for what only a run knows."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(each) for each in itertools.product(*(texts(p, names) for p in parts))]
        case ast.FormattedValue(value=value):
            return texts(value, names) or ["1"]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            sides = (texts(left, names) or ["1"], texts(right, names) or ["1"])
            return ["".join(each) for each in itertools.product(*sides)]
        case ast.IfExp(body=body, orelse=other):
            return [*texts(body, names), *texts(other, names)]
        case ast.Name(id=name) if name in names:
            return texts(names[name], names)
        case ast.Call(func=ast.Name(id="command_line"), args=arguments):
            words = [" ".join(texts(each, names)) or "1" for each in arguments]
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


# Their values are words of options and names that need no quotes.
QUOTED_BEFORE = ("apps/init.py", "tiue_export/export/trt/plan.py")


def bare_values(tree: ast.AST) -> Iterator[str]:
    """The texts that put a value of a run into a command line as it is."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            lines, _ = split(text)
            if lines and text.endswith(lines[-1]) and verb_of(shlex.split(lines[-1])[1:]):
                if not isinstance(part, ast.Constant):
                    yield ast.unparse(node)
            text += part.value if isinstance(part, ast.Constant) else "1"


def test_what_goes_into_a_command_line_is_quoted() -> None:
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        if place not in QUOTED_BEFORE:
            assert list(bare_values(ast.parse(path.read_text("utf-8")))) == [], place
    planted = "f'Make them: tiue-export trt --bundle {bundle.root}'"
    assert list(bare_values(ast.parse(planted))) == [planted]


@pytest.mark.parametrize(
    ("text", "verb", "problem"),
    [
        ("Make one: tiue-export onxx --ckpt A", "trt", "has no 'onxx'"),
        ("Make one: tiue-export coreai --precison fp16", "trt", "No such option: --precison"),
        ("Capture more: tiue-export calibrate ... --count 4", "quantize", "cannot be typed"),
        ("Try --weights fp32, or accept it.", "onnx", "tiue-export onnx has no --weights"),
        ("Serve it with: tiue-export serve", "triton", "Missing argument"),
    ],
)
def test_a_planted_next_line_that_leads_nowhere_is_caught(text, verb, problem) -> None:
    (told,) = mistakes(text, verb)
    assert problem in told


# What the words in capitals stand for, where a test types them.
STANDS_FOR = {
    "STUDENT": "student",
    "CHECKPOINT": "student",
    "student.safetensors": "student",
    "PIPELINE_FOLDER": "student",
    "FOLDER": "new",
    "N": "1",
}


# Minutes of work, or devices that are not here: their plan says as much.
def is_long(words: list[str]) -> bool:
    return words[0] in ("coreml", "coreai", "calibrate") or (
        words[0] != "init" and "--ckpt" in words
    )


GIVEN = re.compile(r"(?:Pass|Add|Give|Write|[Ee]xport with|take it:) (--[a-z-]+)( \w[\w:]*)?")


def obeyed(words: list[str], bundle: Path, said: str, next_step: str) -> list[list[str]]:
    """What a reader types who does what a next line says: its commands, or the line mended."""
    lines, _ = split(next_step)
    if lines:
        known = {**STANDS_FOR, "BUNDLE": bundle.name}
        typed = [[known.get(w, w) for w in shlex.split(line)[1:]] for line in lines]
        plans = [[*each, "--dry-run"] for each in typed if is_long(each)]
        return plans or (typed if typed[0][0] == words[0] else [*typed, words])
    if meant := re.match(r"Did you mean '(.+)'\?", next_step):
        return [[meant[1] if word == said.split()[0] else word for word in words]]
    if named := re.match(r"Name it (\S+)\.$", next_step):
        return [[*words, "--out", named[1]]]
    if re.match("Leave|Give one of", next_step):
        flags = [w for w in words if w.startswith("--")]
        told = [w for w in flags if w in said] or [w for w in flags if w[2:] in said]
        at = words.index((told or flags)[0])
        has_value = at + 1 < len(words) and not words[at + 1].startswith("-")
        return [words[:at] + words[at + 1 + has_value :]]
    if without := re.search(r", without (--[\w-]+)", next_step):
        words = [word for word in words if word != without[1]]
    flag, value = GIVEN.search(next_step).groups(default="")
    kept = words[: words.index(flag)] if flag in words else words
    given = STANDS_FOR.get(value.strip(), value.strip())
    options = VERBS[verb_of(words)].params
    is_flag = any(flag in option.opts and option.is_flag for option in options)
    return [[*kept, flag, *([] if is_flag or not given else [given])]]


@pytest.mark.parametrize(
    "line",
    [
        "inspect fxo",
        "inspect alone",
        "generate fox",
        "generate fox 'a fox' --guidance 3",
        "generate fox 'a fox' --key-steps uniform:2",
        "generate fox 'a fox' --out old.png",
        "generate fox 'a fox' --precision bf16",
        "generate fox 'a fox' --latents noise.npy --seed 2",
        "generate fox 'a fox' --runtime openvino",
        "parity fox --runtime torch",
        "parity fox --runtime coreml",
        "parity fox --runtime coreai",
        "parity 'my sealed fox'",
        "onnx --ckpt student --out new --dry-run --batch 1:2:4",
        "onnx --ckpt student --out new --dry-run --no-hoist --hoist-into decoder",
        "onnx --ckpt student --out new --dry-run --guidance 3",
        "onnx --ckpt student --out new --dry-run --steps 3",
        "onnx --ckpt teacher --out new --dry-run --method faster --dynamic-batch",
        "openvino",
        "openvino --dry-run --bundle fox --height 64",
        "coreml --bundle fox",
        "coreml --ckpt student --dry-run --vae-precision fp16",
        "coreml --ckpt student --dry-run --precision fp32 --compress palettize-6",
        "coreai --bundle fox --dry-run",
        "triton fox --out new --max-batch 2",
        "quantize fox --calibration student",
        "bundle pack fox --out fox.tgz",
        "init",
    ],
)
def test_what_a_failure_says_to_type_leads_out_of_it(
    run, tmp_path, tiny_bundle, tiny_pipeline, bare_teacher, line
):
    made_here = Path(shutil.copytree(tiny_bundle.root, tmp_path / "fox"))
    (tmp_path / "student").symlink_to(tiny_pipeline)
    (tmp_path / "teacher").symlink_to(bare_teacher)
    if "alone" in line:
        (tmp_path / "alone").mkdir()
        made_here.rename(tmp_path / "alone" / "owl")
    if "sealed" in line:
        made_here = made_here.rename(tmp_path / "my sealed fox")
        manifest = made_here / "tiue.json"
        manifest.write_text(manifest.read_text().replace("tiue-export ", "tiue-export  "))
    (tmp_path / "old.png").touch()
    words = shlex.split(line)
    code, _, err = run(*words)
    assert code != 0
    message, _, next_step = err[err.index("error: ") + len("error: ") :].partition("\n  next: ")
    for typed in obeyed(words, made_here, message, next_step.strip()):
        code, _, err = run(*typed)
        assert code == 0, f"{next_step}{shlex.join(typed)}: {err}"
