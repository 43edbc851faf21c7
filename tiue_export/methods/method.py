"""What a method is: it looks at a checkpoint and derives the plan it is drawn by, or says why not.

Everything to the right of this folder reads the plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from tiue_export.errors import UsageError, unknown_name
from tiue_export.sampling.plan import Plan
from tiue_export.student.load import CheckpointFacts

# Key steps that are chosen by measurement.
AUTO = "auto"


@dataclass(frozen=True)
class SamplingOptions:
    """What the user said of the sampling; None (False) is what was not given.

    `key_steps` and `inject` are spelled as on the command line; `key_steps` may also be numbers.
    `budget` is for key steps that are chosen by measurement ("auto").
    """

    steps: int | None = None
    allow_other_steps: bool = False
    scheduler: str | None = None
    key_steps: str | tuple[int, ...] | None = None
    inject: str | None = None
    guidance: float | None = None
    max_decoder_rows: int | None = None
    budget: float | None = None
    recipe: str | None = None
    eta: float | None = None

    def given(self) -> tuple[str, ...]:
        """Names of the options that were given, in their order."""
        defaults = SamplingOptions()
        names = (field.name for field in fields(SamplingOptions))
        return tuple(name for name in names if getattr(self, name) != getattr(defaults, name))


class Method(Protocol):
    """One way of sampling. `takes` names the `SamplingOptions` that mean something to it.

    `features` are those of `registry/support.py` that all its plans have; `takes_controlnet`: its
    passes can be steered by a ControlNet.
    """

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def takes(self) -> tuple[str, ...]: ...
    @property
    def features(self) -> frozenset[str]: ...
    @property
    def takes_controlnet(self) -> bool: ...

    def check(self, options: SamplingOptions) -> None:
        """Refuse options that cannot be, before anything is read."""
        ...

    def plan(self, checkpoint: CheckpointFacts, options: SamplingOptions) -> Plan:
        """The plan of a checkpoint; raises `ScheduleError` where this method is not its own."""
        ...


def refuse_foreign_options(
    known: Sequence[Method], options: SamplingOptions, methods: Mapping[str, Method]
) -> None:
    """Refuse options that none of the `known` methods understands, by their flags."""
    for option in options.given():
        if not any(option in method.takes for method in known):
            flag = "--" + option.replace("_", "-")
            takers = [other for other in methods.values() if option in other.takes]
            raise foreign_option(flag, known[0], takers)


def foreign_option(flag: str, method: Method, takers: Sequence[Method]) -> UsageError:
    """The error for an option that only other methods understand."""
    names, first = " and ".join(other.name for other in takers), takers[0]
    return UsageError(
        f"{flag} is for --method {names}; {method.name} is {method.summary}",
        f"Leave {flag} out; --method {first.name} is {first.summary}.",
    )


def method_named(name: str, methods: Mapping[str, Method]) -> Method:
    """A method by its name; unknown ones are refused with those there are."""
    if name not in methods:
        raise unknown_name("method", name, methods)
    return methods[name]
