"""What a picture was made with, as it is written into its PNG and told to clients."""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Manifest
from tiue_export.registry.backends import BACKENDS
from tiue_export.sampling.plan import Plan


class Drawer(Protocol):
    """What drew, as far as a picture tells: a runtime, or a browser's."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...


def picture_parameters(
    prompt: str,
    seed: int | None,
    negative: str,
    guidance: float | None,
    weighted: bool,
    manifest: Manifest,
    runtime: Drawer,
) -> dict[str, object]:
    """Prompt, seed (None: the noise was given), steering, model and runtime."""
    plan = manifest.plan
    return {
        "prompt": prompt,
        **({} if seed is None else {"seed": seed}),
        **({} if not negative else {"negative_prompt": negative}),
        **({} if guidance is None else {"guidance": guidance}),
        **({"prompt_weights": True} if weighted else {}),
        "steps": plan.steps,
        **({} if not plan.recipe else _recipe_parameters(plan)),
        **({} if plan.one_pass else _plan_parameters(plan)),
        "size": f"{manifest.width_px}x{manifest.height_px}",
        "model": manifest.source.name,
        "model_hash": manifest.source.sha256[:10],
        "graphs_hash": _graphs_hash(manifest, runtime),
        "precision": runtime.precision,
        "runtime": f"{runtime.name} {runtime.device}",
        "version": f"tiue-export {__version__}",
    }


def _graphs_hash(manifest: Manifest, runtime: Drawer) -> str:
    """What draws: ten digits over the bundle's graphs, and the runtime's own form of them."""
    entry = BACKENDS.get(runtime.name)
    forms = (manifest.compiled.get(folder) for folder in (entry.folders if entry else ()))
    made = {
        "onnx": {
            name: {file: each.sha256 for file, each in graph.files.items()}
            for name, graph in manifest.graphs.items()
        },
        "forms": [
            {name: graph.identity for name, graph in form.graphs.items()} for form in forms if form
        ],
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:10]


def _recipe_parameters(plan: Plan) -> dict[str, object]:
    scale = plan.embedded_guidance
    return {
        "recipe": plan.recipe,
        **({} if plan.eta == 0 else {"eta": plan.eta}),
        **({} if scale is None else {"embedded_guidance": scale}),
    }


def _plan_parameters(plan: Plan) -> dict[str, object]:
    return {
        "scheduler": plan.scheduler,
        "key_steps": ",".join(map(str, plan.key_steps)),
        "inject": "off" if plan.injection is None else plan.injection.placement,
    }
