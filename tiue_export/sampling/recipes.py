"""Recipes: how each kind of few-step student is drawn, read from the table recipes.toml."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType

from tiue_export.errors import unknown_name

# What a recipe's guidance can be; recipes.toml says what each means.
NO_GUIDANCE, EMBEDDED, ROWS = "none", "embedded", "rows"


SDXL_FAMILIES = ("sdxl", "ssd-1b", "vega")


@dataclass(frozen=True)
class Recipe:
    """One kind of student; recipes.toml says what each field is."""

    name: str
    title: str
    form: str
    scheduler: str
    steps: tuple[int, ...]
    guidance: str
    base: tuple[str, ...]
    models: tuple[str, ...]
    licence: str
    source: str
    guidance_scale: float | None = None
    eta: float = 0.0
    eta_one_step: float | None = None
    timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    alpha: float | None = None
    prediction_type: str | None = None

    def is_for(self, sdxl: bool) -> bool:
        """Whether it exists for SDXL and its relatives, or for Stable Diffusion 1.x and 2.x."""
        return any((family in SDXL_FAMILIES) == sdxl for family in self.base)

    @property
    def usual_steps(self) -> int:
        """The number of steps where nobody says."""
        return self.steps[0]

    @property
    def rescales_steps(self) -> bool:
        """Whether a drawing from a picture does all steps, below its strength; else the last share.

        diffusers' LCMScheduler does, unless the timesteps are named.
        """
        return self.scheduler == "lcm" and not self.timesteps

    @property
    def starts_once(self) -> bool:
        """Whether it has one timestep, whatever the number of steps."""
        return self.scheduler == "x0" or tuple(self.timesteps) == (1,)

    @property
    def chooses_steps(self) -> bool:
        """Whether other numbers of steps have timesteps, too."""
        return self.scheduler != "x0" and not self.timesteps

    def eta_of(self, steps: int) -> float:
        """The share of fresh noise at so many steps."""
        return self.eta if steps > 1 or self.eta_one_step is None else self.eta_one_step


@functools.cache
def recipes() -> Mapping[str, Recipe]:
    """All recipes by their names, in the table's order."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = resources.files("tiue_export.sampling").joinpath("recipes.toml").read_text("utf-8")
    return MappingProxyType(
        {name: _recipe(name, fields) for name, fields in tomllib.loads(text).items()}
    )


def _recipe(name: str, table: Mapping[str, object]) -> Recipe:
    listed = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    timesteps = listed.pop("timesteps", {})
    assert isinstance(timesteps, dict)
    by_steps = {int(steps): tuple(values) for steps, values in timesteps.items()}
    return Recipe(name=name, timesteps=by_steps, **listed)  # type: ignore[arg-type]


def recipe_named(name: str) -> Recipe:
    """A recipe by its name; an unknown one is refused with those there are."""
    if name not in recipes():
        raise unknown_name("recipe", name, recipes())
    return recipes()[name]
