"""Converts frozen dataclasses to plain JSON/YAML values and back. Unknown or missing keys are errors with a suggestion.

The dataclass is the only schema, for plans, cluster and model files and training recipes alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from planner.errors import SpecError

T = TypeVar("T")

_SCALARS = (float, int, str, bool, type(None))
LATER: Mapping[str, bool] = types.MappingProxyType({"later": True})
"""Metadata of a field added to a dataclass whose values were already stored: it is not written while it has its
default, so that stored digests stay valid."""


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and enums as dicts, lists and strings, which ``json.dumps`` and YAML accept. Fields that are
    not constructor arguments are left out, because they follow from the others."""
    if type(value) in _SCALARS:  # first, because most values of a large cost model are scalars
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: to_plain(item)
            for field, item in items
            if field.init and not ("later" in field.metadata and item == field.default)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or else the known names, for the end of an error line."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if names else ""


def from_plain(cls: type[T], data: Any, *, where: str) -> T:
    """Build ``cls`` from plain values.

    ``where``: name of the file or flag, for messages. Raises SpecError for an unknown or missing key, for a value of
    the wrong type, and with the place added for a SpecError from a dataclass's own ``__post_init__``.
    """
    return typing.cast(T, _convert(cls, data, where))


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, data, where)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if data not in choices:
            raise SpecError(f"{where}: {data!r} is not one of {', '.join(map(str, choices))}")
        return data
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), data, where)
    if origin is dict:
        if not isinstance(data, Mapping):
            raise SpecError(f"{where}: expected a mapping, got {data!r}")
        value_kind = typing.get_args(kind)[1]
        return {str(key): _convert(value_kind, item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError:
            names = ", ".join(str(member.value) for member in kind)
            raise SpecError(f"{where}: {data!r} is not one of {names}") from None
    return _convert_scalar(kind, data, where)


def _convert_union(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return _convert(option, data, where)
        except SpecError:
            continue
    return _convert(rest[-1], data, where)


def _convert_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise SpecError(f"{where}: expected a list, got {data!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if len(args) != len(data):
        raise SpecError(f"{where}: expected {len(args)} values, got {len(data)}")
    pairs = zip(args, data, strict=True)
    return tuple(_convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(pairs))


def _convert_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise SpecError(f"{where}: expected a mapping of {cls.__name__} keys, got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in data:
        if key not in fields:
            raise SpecError(f"{where}: unknown key {key!r}{suggest(str(key), fields)}")
    missing = [
        repr(name) for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        keys = "key" if len(missing) == 1 else "keys"
        raise SpecError(f"{where}: missing {keys} {', '.join(missing)} of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in fields:
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _convert_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is float and isinstance(data, str):  # YAML reads 1e-3 (no dot) as text
        try:
            return float(data)
        except ValueError:
            pass
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)
    if isinstance(data, kind) and not (isinstance(data, bool) and kind is not bool):
        return data
    raise SpecError(f"{where}: expected {kind.__name__}, got {data!r}")
