"""A bundle as a static site: the page's scripts, onnxruntime-web, and the bundle's files in parts.

Parts are small enough for any host and any cache, are kept by the visitor's browser one by one, and
carry their SHA-256 in site.json, which the page holds them against.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiue_export._version import __version__
from tiue_export.bundle.read import MANIFEST_FILE, REFERENCE_FILE, Bundle
from tiue_export.drawing.picture_parameters import picture_parameters
from tiue_export.errors import UsageError
from tiue_export.proof.parity import stage_gate_db
from tiue_export.registry.support import require_support
from tiue_export.sampling.plan import Plan
from tiue_export.specs import GRAPH_NAMES, TEXT_ENCODER, UNET_DECODER, VAE_DECODER
from tiue_export.system.new_folder import new_folder
from tiue_export.system.progress import Observer, stage

from .npm_packages import HERE

PAGE = HERE / "page"
# Whose outputs the page's button measures.
_MEASURED = (TEXT_ENCODER, UNET_DECODER, VAE_DECODER)
# Below the 100 MB a file of GitHub Pages, and little to load again after a break.
PART_BYTES = 32 << 20
UNASKED_BYTES = 200_000_000  # what a first visit loads without a click
_TOKENIZER = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_SERVICE_WORKER, _SITE, _APP, _VENDOR = "sw.js", "site.json", "app.webmanifest", "vendor"
# What sw.js has in their place before it is written for a site.
_NO_PAGE = 'const PAGE = { version: "", files: [], lazy: [] };'
_NO_PARTS = "const PARTS = [];"


@dataclass(frozen=True)
class SiteText:
    """What the page says of itself: its title, and the prompt that stands there at first."""

    title: str | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Part:
    """One file of the site that holds a piece of one of the bundle's."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Site:
    """A written site. `first_visit_bytes` is what a visitor loads who draws by WASM."""

    root: Path
    size_bytes: int
    first_visit_bytes: int
    files: int


@dataclass(frozen=True)
class _Browser:
    """What draws, as a picture's parameters tell it; the page adds the backend."""

    precision: str
    name: str = "onnxruntime-web"
    device: str = ""


def write_site(
    bundle: Bundle,
    out: Path,
    vendored: Mapping[str, Path],
    text: SiteText | None = None,
    *,
    force: bool = False,
    observer: Observer | None = None,
) -> Site:
    """Write the site whole or not at all; `force` replaces an earlier one.

    Raises `UsageError` for a bundle that no page draws, or an `out` that is in the way.
    """
    check_drawable(bundle)
    observer = observer or Observer()
    target = out.resolve()
    with new_folder(target, lambda: _check_target(target, force=force)) as folder:
        with stage(observer, "copy page"):
            pages = _copy_page(folder, vendored)
        with stage(observer, "cut graphs") as running:
            files = {name: _cut(bundle.root / name, name, folder) for name in bundle_files(bundle)}
            running.size_bytes = sum(part.size_bytes for parts in files.values() for part in parts)
        described = _description(bundle, files, text or SiteText())
        _write_json(folder / _SITE, described)
        _write_json(folder / _APP, _web_app(described["title"]))
        pages += [_SITE, _APP]
        _write_service_worker(folder, pages, files)
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        gpu_only = sum(size for path, size in sizes.items() if _for_webgpu(path.name))
        total = sum(sizes.values())
    return Site(target, total, total - gpu_only, len(sizes))


def check_drawable(bundle: Bundle) -> None:
    """Refuse what a page does not draw."""
    require_support("web", bundle)
    manifest = bundle.manifest
    if manifest.batch != 1:
        raise UsageError(
            f"{bundle.root} draws {manifest.batch} pictures at once; a page draws one by one",
            "Export again without --batch.",
        )
    lacking = [name for name in GRAPH_NAMES if name not in manifest.graphs]
    if lacking:
        raise UsageError(
            f"a page starts from words and ends with pixels; {bundle.root} has no {lacking[0]}",
            "Export the bundle with --base and the pipeline folder that holds it.",
        )
    tokens = json.loads(bundle.file(_TOKENIZER[0]).read_text("utf-8"))["added_tokens"]
    words = [token["content"] for token in tokens if not token["special"]]
    if words:
        raise UsageError(
            f"{bundle.root} knows {words[0]} of a textual inversion, which a page does not read",
            "Export it again without --embedding.",
        )


def bundle_files(bundle: Bundle) -> tuple[str, ...]:
    """What a page reads of a bundle, by paths in it, in the order of loading."""
    graphs = bundle.manifest.graphs
    used = [file for name in GRAPH_NAMES for file in graphs[name].files if ".onnx" in file]
    return (MANIFEST_FILE, *_TOKENIZER, *used, REFERENCE_FILE)


def _copy_page(folder: Path, vendored: Mapping[str, Path]) -> list[str]:
    """The page's own files and those of npm, by their paths in the site."""
    own = sorted(path for path in PAGE.iterdir() if path.is_file())
    for path in own:
        shutil.copyfile(path, folder / path.name)
    (folder / _VENDOR).mkdir()
    for name, path in vendored.items():
        shutil.copyfile(path, folder / _VENDOR / name)
    return [*(path.name for path in own), *(f"{_VENDOR}/{name}" for name in vendored)]


def _cut(source: Path, name: str, folder: Path) -> list[Part]:
    """Write one of the bundle's files in parts."""
    parts: list[Part] = []
    with source.open("rb") as file:
        while content := file.read(PART_BYTES):
            digest = hashlib.sha256(content).hexdigest()
            # By content: what a browser keeps under a name never changes.
            place = f"bundle/{name}.{len(parts)}-{digest[:8]}"
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(content)
            parts.append(Part(place, len(content), digest))
    return parts


def _description(
    bundle: Bundle, files: Mapping[str, Iterable[Part]], text: SiteText
) -> dict[str, Any]:
    """site.json: what the page is told."""
    manifest, plan = bundle.manifest, bundle.manifest.plan
    parameters = picture_parameters(
        "", None, "", None, False, manifest, _Browser(manifest.precision)
    )
    listed = {
        name: {
            "size_bytes": sum(part.size_bytes for part in parts),
            "parts": [asdict(part) for part in parts],
        }
        for name, parts in files.items()
    }
    first = [file["size_bytes"] for name, file in listed.items() if name != REFERENCE_FILE]
    return {
        "title": text.title or f"{manifest.source.name} draws",
        "prompt": text.prompt,
        "model": manifest.source.name,
        "precision": manifest.precision,
        "made_by": f"tiue-export {__version__}",
        "width_px": manifest.width_px,
        "height_px": manifest.height_px,
        "one_pass": plan.one_pass,
        "steps_text": _steps_text(plan),
        "guidance": plan.guidance,
        "half": any(graph.precision == "fp16" for graph in manifest.graphs.values()),
        "largest_tensor_bytes": largest_tensor_bytes(bundle),
        "open_bytes": {name: open_bytes(bundle, name) for name in GRAPH_NAMES},
        "gates_db": {
            graph: stage_gate_db(manifest, graph, manifest.precision) for graph in _MEASURED
        },
        "total_bytes": sum(first),
        "unasked_bytes": UNASKED_BYTES,
        "parameters": {k: v for k, v in parameters.items() if k not in ("prompt", "runtime")},
        "files": listed,
    }


def _steps_text(plan: Plan) -> str:
    passes = len(plan.passes)
    if passes == 1:
        return "in one pass of its network"
    return f"in {plan.rows} steps" + ("" if passes == plan.rows else f", {passes} of them whole")


def largest_tensor_bytes(bundle: Bundle) -> int:
    """The largest tensor of the graphs, weights and what is between them: a GPU's buffer holds one.

    At Stable Diffusion's size that is attention's weights, (K*B*heads, 4096, 4096).
    """
    return max(_tensor_bytes(bundle))


def open_bytes(bundle: Bundle, graph: str) -> int:
    """What a graph's weights take in WASM, which computes half precision in float32."""
    import onnx

    wide = {onnx.TensorProto.FLOAT16: onnx.TensorProto.FLOAT}
    weights = onnx.load(bundle.graph_path(graph), load_external_data=False).graph.initializer
    kinds = (wide.get(weight.data_type, weight.data_type) for weight in weights)
    return sum(
        _item_bytes(kind) * math.prod(weight.dims)
        for kind, weight in zip(kinds, weights, strict=True)
    )


def _tensor_bytes(bundle: Bundle) -> Iterator[int]:
    import onnx

    for name in GRAPH_NAMES:
        graph = onnx.load(bundle.graph_path(name), load_external_data=False).graph
        for weight in graph.initializer:
            yield _item_bytes(weight.data_type) * math.prod(weight.dims)
        for value in (*graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            sides = [side.dim_value for side in tensor.shape.dim]
            yield _item_bytes(tensor.elem_type) * math.prod(sides)


def _item_bytes(kind: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _web_app(title: str) -> dict[str, Any]:
    """The page as an app that a phone installs (W3C's web app manifest)."""
    icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}
    return {"name": title, "short_name": title[:12], "start_url": ".", "display": "standalone",
            "background_color": "#fafaf9", "theme_color": "#c2580d", "icons": [icon]}  # fmt: skip


def _write_service_worker(
    folder: Path, pages: list[str], files: Mapping[str, Iterable[Part]]
) -> None:
    """Fill in what the service worker keeps; a page that changed has another version."""
    digest = hashlib.sha256()
    for name in sorted(pages):
        digest.update((folder / name).read_bytes())
    lazy = [name for name in pages if name.endswith(".wasm") or _for_webgpu(name)]
    others = [name for name in pages if name not in (*lazy, _SERVICE_WORKER)]
    page = {"version": digest.hexdigest()[:16], "files": ["./", *others], "lazy": lazy}
    parts = [part.path for each in files.values() for part in each]
    path = folder / _SERVICE_WORKER
    source = path.read_text("utf-8")
    for empty, filled in ((_NO_PAGE, f"const PAGE = {json.dumps(page)};"),
                          (_NO_PARTS, f"const PARTS = {json.dumps(parts)};")):  # fmt: skip
        assert source.count(empty) == 1
        source = source.replace(empty, filled)
    path.write_text(source, "utf-8")


def _for_webgpu(name: str) -> bool:
    return name.endswith("ort.min.mjs") or "jsep" in name


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UsageError(f"--out {target} is a file", "Name a folder.")
    if not (target / _SITE).is_file() or not (target / _SERVICE_WORKER).is_file():
        raise UsageError(
            f"{target} holds other things than a site of tiue-export; it is never replaced",
            "Choose another --out.",
        )
    if not force:
        raise UsageError(
            f"{target} holds a site already", "Pass --force to replace it, or another --out."
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
