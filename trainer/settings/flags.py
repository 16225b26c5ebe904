"""Command-line flags for a tree of dataclasses: dotted names, short forms, and one clear line per mistake.

tyro provides the help and the short forms (``tyro.conf.arg(aliases=...)`` on a field). Values are read by
``planner.codec``, as those of a YAML recipe are, so a wrong value gives the same message wherever it was written.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from planner.codec import from_plain
from planner.errors import SpecError

T = TypeVar("T")

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One flag: the place of its value in the tree, and the type of that value."""

    section: str
    field: str
    kind: Any

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of a union such as ``int | None``, or just the type."""
        return typing.get_args(self.kind) if type(None) in typing.get_args(self.kind) else (self.kind,)


def short(flag: str) -> Any:
    """Annotation that gives a field a short flag in addition to its dotted name."""
    return tyro.conf.arg(aliases=(flag,))


def apply_flags(config: T, arguments: Sequence[str]) -> T:
    """A copy of ``config`` with the overrides in ``arguments``: ``--section.field value`` or ``=value``, or short
    flags.

    Hyphens and underscores are equivalent; the last of repeated flags counts. Raises SpecError with one line per
    mistake, all at once.
    """
    options = _options(type(config))
    changes: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    waiting = list(arguments)
    while waiting:
        try:
            option, value = _take(options, waiting)
        except SpecError as error:
            problems.append(str(error))
            continue
        changes.setdefault(option.section, {})[option.field] = value
    if problems:
        raise SpecError("\n".join(problems))
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)  # type: ignore[type-var]


def print_help(config: Any, *, prog: str, description: str) -> None:
    """All flags with their meaning; the defaults shown are the values in ``config``, so those of the recipe."""
    try:
        tyro.cli(type(config), default=config, args=["--help"], prog=prog, description=description)
    except SystemExit:
        return


def _options(tree: type) -> dict[str, Option]:
    """Every accepted spelling (hyphens) of every flag of the tree."""
    options: dict[str, Option] = {}
    for section, section_type in typing.get_type_hints(tree).items():
        annotated = typing.get_type_hints(section_type, include_extras=True)
        for name, kind in typing.get_type_hints(section_type).items():
            option = Option(section, name, kind)
            aliases = [alias for extra in _extras(annotated[name]) for alias in getattr(extra, "aliases", None) or ()]
            for flag in (f"--{section}.{name}".replace("_", "-"), *aliases):
                options[flag] = option
    return options


def _extras(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _take(options: dict[str, Option], waiting: list[str]) -> tuple[Option, Any]:
    """Remove the next flag and its value from ``waiting``, also if the flag is unknown."""
    word = waiting.pop(0)
    if not word.startswith("--"):
        raise SpecError(f"unexpected argument {word!r}: flags are --section.key value, and the recipe comes first")
    flag, has_value, text = word.partition("=")
    name = flag.replace("_", "-")
    option = options.get(name)
    if option is None and (option := options.get(_without_no(name))) is not None and bool in option.kinds:
        if has_value:
            raise SpecError(f"{flag}: takes no value; write {_without_no(name)}={text} instead")
        return option, False
    if option is None:
        if not has_value and waiting and not waiting[0].startswith("--"):
            waiting.pop(0)
        raise SpecError(f"unknown option {flag}{_nearest(name, options)}")
    if not has_value and bool in option.kinds:
        text = waiting.pop(0) if waiting and waiting[0].lower() in (*_BOOLEANS, *_NOTHING) else "true"
    elif not has_value:
        if not waiting or waiting[0].startswith("--"):
            raise SpecError(f"{flag}: a value is missing")
        text = waiting.pop(0)
    return option, from_plain(option.kind, _plain(option, text), where=flag)


def _without_no(name: str) -> str:
    """``--run.no-resume`` -> ``--run.resume``; ``--no-resume`` -> ``--resume``; anything else unchanged."""
    head, dot, tail = name.removeprefix("--").rpartition(".")
    return f"--{head}{dot}{tail.removeprefix('no-')}"


def _nearest(name: str, options: dict[str, Option]) -> str:
    """A suggestion: compare whole names first, then only their last part, to find the flag in another section."""
    whole = difflib.get_close_matches(name, options, n=1)
    if whole:
        return f" (did you mean {whole[0]}?)"
    by_field = {_last_part(flag): flag for flag in options}
    close = difflib.get_close_matches(_last_part(name), by_field, n=1)
    return f" (did you mean {by_field[close[0]]}?)" if close else "; --help lists them all"


def _last_part(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2]


def _plain(option: Option, text: str) -> Any:
    """The value a YAML reader would give for this field: text stays text only if the field is text."""
    if type(None) in option.kinds and text.lower() in _NOTHING:
        return None
    if bool in option.kinds:
        return _BOOLEANS.get(text.lower(), text)
    if int in option.kinds or float in option.kinds:
        try:
            return int(text)
        except ValueError:
            return text
    return text
