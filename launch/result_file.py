"""Files that commands write their results to: refused before the work where they cannot be, whole or not there after.
"""

from __future__ import annotations

import os
from pathlib import Path

from planner.errors import SpecError


def check_target(flag: str, target: str | None) -> None:
    """Raises SpecError where ``target`` (None: not asked for) is no place for a file, before anything is computed."""
    if target is None:
        return
    path = Path(target)
    if not target or path.is_dir():
        raise SpecError(f"{flag}: {target or repr(target)} is {'a folder' if target else 'no name'}; name a file")
    if not path.parent.is_dir():
        raise SpecError(f"{flag}: folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SpecError(f"{flag}: cannot write {target} (Permission denied)")


def write_result(flag: str, target: str, text: str) -> None:
    """Write beside the file and rename, so that whoever stops us leaves the old file or the new one; devices and pipes
    are written as they are. Raises SpecError where that fails."""
    path = Path(os.path.realpath(target))
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SpecError(f"{flag}: cannot write {target} ({error.strerror})") from None
