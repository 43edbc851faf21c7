"""From frozen dataclasses of options to a typer command, and back to what was typed.

A command is a function of groups, which are its request. A field of a group is an option or an
argument, `height: int = option(512, "Pixels.")`, or plain data that no option sets; what is typed
`tuple[X, ...]` may be repeated. A group may inherit others: it then has their options, each under
the heading of the group that it comes from. Python puts the fields of the last base first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import EllipsisType, GenericAlias
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from tiue_export.errors import UsageError

from ..report.failures import explained

T = TypeVar("T")
# What the shell offers for the beginning of a value: words, or words with what each means.
Completion = Callable[[str], list[str]] | Callable[[str], list[tuple[str, str]]]
_INFO = "typer"


@dataclass(frozen=True)
class OptionGroup:
    """Options that belong together, under one heading of a command's help."""

    panel: ClassVar[str] = "Options"


def option(
    default: T | EllipsisType, text: str, flag: str = "", *, completion: Completion | None = None
) -> T:
    """A field that an option sets, named like it unless `flag` is given; `...`: it is required.

    `text` is its help. "--yes/--no" is two flags of one option.
    """
    flags = (flag,) if flag else ()
    return _field(default, typer.Option(..., *flags, help=text, autocompletion=completion))


def argument(
    default: T | EllipsisType,
    text: str,
    *,
    metavar: str | None = None,
    completion: Completion | None = None,
) -> T:
    """The same for what is typed without a flag."""
    info = typer.Argument(
        ..., help=text, metavar=metavar, show_default=False, autocompletion=completion
    )
    return _field(default, info)


def _field(default: T | EllipsisType, info: ParameterInfo) -> T:
    usual: dict[str, Any] = {} if default is ... else {"default": default}
    made: T = field(metadata={_INFO: info}, **usual)
    return made


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function of groups as typer wants it: one parameter an option, failures explained."""
    hints = get_type_hints(function)
    hints.pop("return", None)
    parameters = [each for name, hint in hints.items() for each in _parameters(name, hint)]

    @functools.wraps(function)
    def call(**values: Any) -> None:
        function(**{name: _value(name, hint, values) for name, hint in hints.items()})

    guarded = explained(call, _flags(hints.values()))
    guarded.__dict__["__signature__"] = inspect.Signature(parameters)
    guarded.__annotations__ = {each.name: each.annotation for each in parameters}
    return guarded


def _flags(hints: Iterable[Any]) -> frozenset[str]:
    """Every flag of a command's groups."""
    groups = [hint for hint in hints if _is_group(hint)]
    return frozenset(each.flag(True) for group in groups for each in _options(group).values())


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


def picked(kind: type[T], options: object, /, **others: Any) -> T:
    """A dataclass made of the options that are named like its fields, and of `others`.

    An option that is None was not given: the dataclass has its own default.
    """
    names = [each.name for each in fields(cast(Any, kind)) if each.name not in others]
    given_ones = {name: getattr(options, name, None) for name in names}
    return kind(**others, **{k: value for k, value in given_ones.items() if value is not None})


def flag_of(group: type[OptionGroup], name: str) -> str:
    """The flag of one field: "--queue"."""
    return _options(group)[name].flag(True)


@dataclass(frozen=True)
class _Option:
    """One field: its default, what typer is told of it, and the parameter that typer sees.

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
        yes, _, no = str((self.info.param_decls or ("",))[0]).partition("/")
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
        hints = inspect.get_annotations(group, eval_str=True)
        _OWN[group] = {
            each.name: _option(group.panel, each, hints[each.name])
            for each in fields(group)
            if each.name in hints and _INFO in each.metadata
        }
    return _OWN[group]


def _option(panel: str, each: Field[Any], kind: Any) -> _Option:
    info: ParameterInfo = each.metadata[_INFO]
    many = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
    if isinstance(info, OptionInfo):
        info.rich_help_panel = panel
        info.param_decls = info.param_decls or (f"--{each.name.replace('_', '-')}",)
    if many:
        kind = GenericAlias(list, get_args(kind)[:1]) | None
        info.default = None
    elif each.default is not MISSING:
        info.default = each.default
    parameter = inspect.Parameter(each.name, _KEYWORD, default=info, annotation=kind)
    return _Option(each.default, info, many, parameter)


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
    options = _options(hint)
    made = {
        name: tuple(values[name] or ()) if option.many else values[name]
        for name, option in options.items()
    }
    for name, option in options.items():
        for each in made[name] if option.many else (made[name],):
            _check_text(option.flag(each), each)
    return hint(**made)


def _check_text(flag: str, value: object) -> None:
    """Refuse words that are no text; a path may be any bytes."""
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{flag} is {value[:50]!r}, which is no UTF-8 text",
            "Type it in UTF-8 (LC_ALL=C.UTF-8); prompts may also come from a file: --prompts FILE",
        ) from error


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, OptionGroup)
