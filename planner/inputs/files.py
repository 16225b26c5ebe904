"""Loads clusters and models by built-in name or from a YAML file: strict keys, human units, one-line errors.

``load_cluster("h200-8")`` reads ``planner/inputs/hardware/h200-8.yaml``; a name with a slash or the ending ``.yaml`` or
``.yml`` is a path. Byte fields accept ``40 GiB``, rate fields ``312 TFLOP/s`` or ``80 GB/s``; plain numbers are in base
units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from planner.codec import from_plain, suggest
from planner.errors import SpecError
from planner.inputs.cluster import ClusterSpec
from planner.inputs.model import ModelSpec
from planner.units import format_count, parse_bytes, parse_rate

T = TypeVar("T", ClusterSpec, ModelSpec)


def load_cluster(name_or_path: str) -> ClusterSpec:
    """Raises SpecError: unknown name, unreadable file, malformed YAML, unknown or missing key, impossible value."""
    return _load(ClusterSpec, name_or_path, folder="hardware", what="cluster")


def load_model(name_or_path: str) -> ModelSpec:
    """Raises SpecError: unknown name, unreadable file, malformed YAML, unknown or missing key, impossible value."""
    return _load(ModelSpec, name_or_path, folder="models", what="model")


def cluster_names() -> tuple[str, ...]:
    return _names("hardware")


def model_names() -> tuple[str, ...]:
    return _names("models")


def sources(cluster: ClusterSpec, model: ModelSpec) -> tuple[tuple[str, str], ...]:
    """Where the numbers of a cluster and a model come from, as (part, source). A guess contains the word ``guess``."""
    return (
        (f"device {cluster.device.name}", cluster.device.source),
        ("host", cluster.host.source),
        ("intra-node link", cluster.intra_node.source),
        ("inter-node link", cluster.inter_node.source),
        (f"model {model.name} of {_size(model)}", model.source or "no source given"),
    )


def _size(model: ModelSpec) -> str:
    """For example ``8.03B parameters``, or ``46.7B parameters, 12.9B active``."""
    active = f", {format_count(model.num_active_params)} active" if model.num_active_params < model.num_params else ""
    return f"{format_count(model.num_params)} parameters{active}"


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (Path(__file__).parent / folder).glob("*.yaml")))


def _load(cls: type[T], name_or_path: str, *, folder: str, what: str) -> T:
    path = _find(name_or_path, folder, what)
    from planner.inputs.yaml_file import read_yaml  # here, so that importing the planner stays fast

    where = f"{what} {name_or_path}"
    return from_plain(cls, _convert_units(read_yaml(path, f"{what} file {path}"), where), where=where)


def _find(name_or_path: str, folder: str, what: str) -> Path:
    if "/" not in name_or_path and not name_or_path.endswith((".yaml", ".yml")):
        if name_or_path not in _names(folder):
            hint = suggest(name_or_path, _names(folder))
            raise SpecError(f"unknown {what} {name_or_path!r}{hint}; a file of your own must end in .yaml")
        return Path(__file__).parent / folder / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if not path.exists():
        raise SpecError(f"{what} file {name_or_path} does not exist (built-in: {', '.join(_names(folder))})")
    return path


def _convert_units(data: Any, where: str) -> Any:
    """Convert text to base units by the unit in the key's name; other values are returned unchanged."""
    if not isinstance(data, Mapping):
        return data
    return {key: _convert_value(str(key), value, f"{where}.{key}") for key, value in data.items()}


def _convert_value(key: str, value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return _convert_units(value, where)
    if not isinstance(value, str):
        return value
    convert: Callable[..., float] | None = None
    if key.endswith("_per_s"):
        convert = parse_rate
    elif key.endswith("_bytes"):
        convert = parse_bytes
    return value if convert is None else convert(value, what=where)
