"""What a picture was made with, as it is written into its PNG and told to clients."""

from __future__ import annotations

from tiue_export._version import __version__
from tiue_export.drawing.pipeline import Picture, Pipeline
from tiue_export.sampling.plan import Plan


def picture_parameters(
    picture: Picture, pipeline: Pipeline, latents: str | None = None
) -> dict[str, object]:
    """Prompt, seed or the name of the file with the noise (`latents`), model and runtime."""
    manifest = pipeline.bundle.manifest
    plan = manifest.plan
    return {
        "prompt": picture.prompt,
        **({} if latents is None else {"latents": latents}),
        **({} if picture.seed is None else {"seed": picture.seed}),
        **({} if not picture.negative_prompt else {"negative_prompt": picture.negative_prompt}),
        **({} if picture.guidance is None else {"guidance": picture.guidance}),
        "steps": plan.steps,
        **({} if plan.one_pass else _plan_parameters(plan)),
        "size": f"{manifest.width_px}x{manifest.height_px}",
        "model": manifest.source.name,
        "model_hash": manifest.source.sha256[:10],
        "precision": pipeline.runtime.precision,
        "runtime": f"{pipeline.runtime.name} {pipeline.runtime.device}",
        "version": f"tiue-export {__version__}",
    }


def _plan_parameters(plan: Plan) -> dict[str, object]:
    return {
        "scheduler": plan.scheduler,
        "key_steps": ",".join(map(str, plan.key_steps)),
        "inject": "off" if plan.injection is None else plan.injection.placement,
    }
