"""`tiue-export recipes`: the few-step students that are known, and how each is drawn."""

from __future__ import annotations

from dataclasses import asdict

from rich import box

from tiue_export.sampling.recipes import ROWS, Recipe, recipes

from .report.tables import PlainTable, console, print_json


def run(as_json: bool) -> None:
    """Print the table of recipes."""
    if as_json:
        print_json([asdict(recipe) for recipe in recipes().values()])
        return
    table = PlainTable("recipe", "steps", "scheduler", "guidance", "form", "for", box=box.SIMPLE)
    for recipe in recipes().values():
        table.add_row(
            recipe.name,
            _steps(recipe),
            recipe.scheduler,
            _guidance(recipe),
            _FORMS[recipe.form],
            ", ".join(recipe.models) or recipe.title,
        )
    console.print(table)
    console.print(
        "tiue-export onnx --ckpt sd-turbo/ --recipe sd-turbo --steps 1\n"
        "tiue-export onnx --ckpt sd15/ --lora Hyper-SD15-4steps-lora.safetensors "
        "--recipe hyper-sd-4\n"
        "Licences and sources: tiue-export recipes --json, docs/few-step.md",
        highlight=False,
    )


_FORMS = {"unet": "UNet", "lora": "LoRA", "either": "UNet, LoRA"}


def _steps(recipe: Recipe) -> str:
    """The usual number first, then the others."""
    usual, *others = recipe.steps
    return str(usual) + (f" ({_ranges(others)})" if others else "")


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _guidance(recipe: Recipe) -> str:
    if recipe.guidance_scale is None:
        return "distilled in"
    doubled = recipe.guidance == ROWS and recipe.guidance_scale > 1
    return f"{recipe.guidance_scale:g}" + (", twice the rows" if doubled else "")
