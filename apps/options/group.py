"""From frozen dataclasses of options to a typer command, and back to what was typed.

A command is a function of groups, which are its request. A field of a group is an option or an
argument, `Annotated[T, typer.Option("--flag", help=...)] = default`, or plain data that no option
sets; `tuple[X, ...]` may be repeated. A group may inherit others: it then has their options, each
under the heading of the group that it comes from. Python puts the fields of the last base first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, dataclass
from types import GenericAlias
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from typer.models import OptionInfo, ParameterInfo

from tiue_export.errors import UsageError

from ..report.failures import explained


@dataclass(frozen=True)
class OptionGroup:
    """Options that belong together, under one heading of a command's help."""

    panel: ClassVar[str] = "Options"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function of groups as typer wants it: one parameter an option, failures explained."""
    hints = get_type_hints(function)
    hints.pop("return", None)
    parameters = [each for name, hint in hints.items() for each in _parameters(name, hint)]

    @functools.wraps(function)
    def call(**values: Any) -> None:
        function(**{name: _value(name, hint, values) for name, hint in hints.items()})

    guarded = explained(call)
    guarded.__dict__["__signature__"] = inspect.Signature(parameters)
    guarded.__annotations__ = {each.name: each.annotation for each in parameters}
    return guarded


def given(
    *groups: OptionGroup, usable: Collection[str] = (), only: Collection[str] | None = None
) -> tuple[str, ...]:
    """The flags of all options that are not as they would be had nobody typed them.

    `usable` names fields that are left out of it; `only` those that are looked at, None: all.
    """
    return tuple(
        option.flag(getattr(group, name))
        for group in groups
        for name, option in _options(type(group)).items()
        if getattr(group, name) != option.default
        if name not in usable and (only is None or name in only)
    )


def typed(group: OptionGroup, only: Collection[str]) -> list[str]:
    """The words that give some fields of a group their value, where nobody would have it so."""
    words = []
    for name, option in _options(type(group)).items():
        value = getattr(group, name)
        if name in only and value != option.default:
            for each in value if option.many else (value,):
                words += [option.flag(each), *([] if isinstance(each, bool) else [str(each)])]
    return words


def refuse(
    why: str,
    next_step: str,
    *groups: OptionGroup,
    usable: Collection[str] = (),
    only: Collection[str] | None = None,
) -> None:
    """Raise `UsageError` naming the options of `groups` that were given; `why` follows them."""
    if flags := given(*groups, usable=usable, only=only):
        verb = "is" if len(flags) == 1 else "are"
        raise UsageError(f"{', '.join(flags)} {verb} {why}", next_step)


def flag_of(group: type[OptionGroup], name: str) -> str:
    """The flag of one field: "--queue"."""
    return _options(group)[name].flag(True)


@dataclass(frozen=True)
class _Option:
    """One field: what typer is told of it, and the parameter that typer sees.

    `many` marks a `tuple[X, ...]`, which typer knows as an optional list.
    """

    default: Any
    info: ParameterInfo
    many: bool
    parameter: inspect.Parameter

    def flag(self, value: Any) -> str:
        """ "--flag", of "--flag/--no-flag" the one that says `value`; "VALUE" for an argument."""
        if not isinstance(self.info, OptionInfo):
            return str(self.info.metavar or "an argument")
        # Inside Annotated, typer keeps the first name of an option where its default would be.
        yes, _, no = str(self.info.default).partition("/")
        return no if value is False and no else yes


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
# Groups are read once: several commands share most of them, and --help reads all.
_OWN: dict[type[OptionGroup], dict[str, _Option]] = {}


def _options(group: type[OptionGroup]) -> dict[str, _Option]:
    """Each field of a group that is an option or an argument, in the order of its dataclass."""
    options: dict[str, _Option] = {}
    for each in reversed(group.__mro__):
        if issubclass(each, OptionGroup):
            options.update(_own_options(each))
    return options


def _own_options(group: type[OptionGroup]) -> dict[str, _Option]:
    """Those that the group does not inherit."""
    if group not in _OWN:
        _OWN[group] = {}
        for name, hint in inspect.get_annotations(group, eval_str=True).items():
            kind, *more = get_args(hint) or (None,)
            for info in more:
                if isinstance(info, ParameterInfo):
                    _OWN[group][name] = _option(group, name, kind, info)
    return _OWN[group]


def _option(group: type[OptionGroup], name: str, kind: Any, info: ParameterInfo) -> _Option:
    default = shown_default = group.__dict__.get(name, MISSING)
    shown, many = copy(info), get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
    if isinstance(shown, OptionInfo):
        shown.rich_help_panel = group.panel
    if many:
        kind, shown_default = GenericAlias(list, get_args(kind)[:1]) | None, None
    if shown_default is MISSING:
        shown_default = inspect.Parameter.empty
    typed = Annotated[kind, shown]
    parameter = inspect.Parameter(name, _KEYWORD, default=shown_default, annotation=typed)
    return _Option(default, info, many, parameter)


def _parameters(name: str, hint: Any) -> Iterator[inspect.Parameter]:
    """What typer sees of a parameter: the options of a group, or itself where it is none."""
    if not _is_group(hint):
        yield inspect.Parameter(name, _KEYWORD, annotation=hint)
        return
    for option in _options(hint).values():
        yield option.parameter


def _value(name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    """A group made of what typer read, or the value of a parameter that is none."""
    if not _is_group(hint):
        return values[name]
    return hint(
        **{
            field: tuple(values[field] or ()) if option.many else values[field]
            for field, option in _options(hint).items()
        }
    )


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, OptionGroup)
