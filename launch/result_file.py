"""Files that commands write results to: checked before the work begins, and written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from planner.errors import SpecError


def check_target(flag: str, target: str | None) -> None:
    """Raise SpecError, before anything is computed, if no file can be written at ``target`` (None: not requested)."""
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
    """Write a temporary file and rename it, so that an interruption leaves either the old file or the new one. Devices
    and pipes are written directly. Raises SpecError on failure."""
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
