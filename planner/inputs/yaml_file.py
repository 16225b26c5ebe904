"""The only YAML reader: plain values, unique keys, one line for every mistake."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from planner.errors import SpecError


class _UniqueKeys(yaml.SafeLoader):
    """Rejects repeated keys. YAML forbids them, but PyYAML keeps the last one and silently drops the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice",
                                                            key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, where: str) -> Any:
    """The value in a file. ``where`` begins every message, for example ``cluster file mine.yaml``. Raises SpecError if
    the file cannot be read, is not YAML, or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{where}: cannot be read (it is not a text file)") from None
    except OSError as error:
        raise SpecError(f"{where}: cannot be read ({error.strerror or error})") from None
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """Like ``read_yaml``, but for the text itself. Raises SpecError."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{where}{place}: not valid YAML ({error.problem})") from None
    except RecursionError:
        raise SpecError(f"{where}: not valid YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
