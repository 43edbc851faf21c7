"""onnxruntime-web and a tokenizer from npm, by the lock file beside this one; kept once fetched."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tiue_export.errors import MissingExtraError, ResourceError
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.new_folder import new_folder
from tiue_export.system.owned_path import temporary_folder

HERE = Path(__file__).parent
CACHE_KIND = "npm"
# What a page loads: of the two runtimes only the one that draws.
VENDORED = (
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "onnxruntime-web/dist/ort.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.jsep.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.jsep.wasm",
)
_LOCK = ("package.json", "package-lock.json")
_LONGEST_S = 600


def vendored_files(packages: Path | None = None) -> dict[str, Path]:
    """The files that a page loads, by name; fetched on first use, or out of a node_modules folder.

    Raises `MissingExtraError` without npm, or where `packages` lacks a file, `ResourceError` where
    npm fails.
    """
    folder = _cached() if packages is None else packages
    paths = {Path(name).name: folder / name for name in VENDORED}
    lacking = [str(path) for path in paths.values() if not path.is_file()]
    if lacking:
        raise MissingExtraError(f"{lacking[0]} is missing", _by_hand())
    return paths


def _cached() -> Path:
    decides = (HERE / "package-lock.json").read_bytes() + "\n".join(VENDORED).encode()
    target = user_cache_folder() / CACHE_KIND / hashlib.sha256(decides).hexdigest()[:16]
    if target.is_dir():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(
            "a page needs onnxruntime-web from npm, and npm is not installed", _by_hand()
        )
    with temporary_folder() as work:
        for name in _LOCK:
            shutil.copy(HERE / name, work / name)
        _install(npm, work)
        with new_folder(target, lambda: None) as folder:
            for name in VENDORED:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(work / "node_modules" / name, folder / name)
    return target


def _install(npm: str, folder: Path) -> None:
    """By the lock file, hashes checked, no scripts of packages run."""
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"npm had not fetched onnxruntime-web after {_LONGEST_S} s", _by_hand()
        ) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[0] if lines else f"exit code {done.returncode}"
        raise ResourceError(f"npm could not fetch onnxruntime-web: {reason}", _by_hand())


def _by_hand() -> str:
    return (
        f"Install Node.js; or run `npm ci` on another machine in a copy of {HERE / _LOCK[0]} and "
        f"{_LOCK[1]}, bring its node_modules here, and pass --packages node_modules."
    )
