"""What a picture was made with, as it is written into its PNG and told to clients."""

from __future__ import annotations

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Manifest
from tiue_export.sampling.plan import Plan
from tiue_export.specs import Runtime


def picture_parameters(
    prompt: str,
    seed: int | None,
    negative: str,
    guidance: float | None,
    manifest: Manifest,
    runtime: Runtime,
) -> dict[str, object]:
    """Prompt, seed (None: the noise was given), steering, model and runtime."""
    plan = manifest.plan
    return {
        "prompt": prompt,
        **({} if seed is None else {"seed": seed}),
        **({} if not negative else {"negative_prompt": negative}),
        **({} if guidance is None else {"guidance": guidance}),
        "steps": plan.steps,
        **({} if plan.one_pass else _plan_parameters(plan)),
        "size": f"{manifest.width_px}x{manifest.height_px}",
        "model": manifest.source.name,
        "model_hash": manifest.source.sha256[:10],
        "precision": runtime.precision,
        "runtime": f"{runtime.name} {runtime.device}",
        "version": f"tiue-export {__version__}",
    }


def _plan_parameters(plan: Plan) -> dict[str, object]:
    return {
        "scheduler": plan.scheduler,
        "key_steps": ",".join(map(str, plan.key_steps)),
        "inject": "off" if plan.injection is None else plan.injection.placement,
    }
