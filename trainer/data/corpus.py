"""Where documents come from: text files, JSONL, token arrays, or by default Python's own source files.

``find_corpus`` lists the files; ``read_documents`` reads them, one document at a time. Documents that are skipped are
counted and reported; a mistake is a SpecError with the file (and line).
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.codec import suggest
from planner.errors import SpecError
from planner.units import MIB

IdArray = npt.NDArray[np.integer[Any]]

MIN_LIBRARY_BYTES = MIB
JSONL_SUFFIXES = (".jsonl", ".ndjson")
ARRAY_SUFFIX = ".npy"
OFFSETS_SUFFIX = ".offsets.npy"

# Not in every installation (tests, IDE), installed by users (site-packages), or tables instead of text (encodings).
_LIBRARY_SKIPS = frozenset({
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "site-packages", "dist-packages",
})


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSource:
    """Files to read documents from. ``strict``: the user named these files, so one that is not text is an error."""

    name: str
    files: tuple[Path, ...]
    text_field: str
    strict: bool = False


def find_corpus(path: str | None, *, text_field: str = "text") -> CorpusSource:
    """List the files of a corpus, sorted, without reading them.

    ``path``: None (the standard library), a folder (every visible regular file below it), one file, or a glob
    pattern. Raises SpecError if there is nothing, or if a folder cannot be read.
    """
    if path is None:
        return _standard_library(Path(sysconfig.get_paths()["stdlib"]), text_field)
    root = Path(path)
    try:
        is_folder, is_file, exists = root.is_dir(), root.is_file(), root.exists()
    except OSError as error:
        raise SpecError(f"corpus {path!r}: cannot be read ({error.strerror})") from None
    if is_folder:
        files = tuple(file for file in _walk(root, frozenset()) if not file.name.endswith(OFFSETS_SUFFIX))
        return _not_empty(CorpusSource(name=path, files=files, text_field=text_field))
    if is_file:
        return CorpusSource(name=path, files=(root,), text_field=text_field, strict=True)
    if exists:
        raise SpecError(f"corpus {path!r}: neither a regular file nor a folder")
    try:
        matches = sorted(Path(root.anchor).glob(str(root.relative_to(root.anchor))))
        files = tuple({
            match.resolve(): match  # a file with two links to it is read once
            for match in reversed(matches) if match.is_file() and not match.name.endswith(OFFSETS_SUFFIX)
        }.values())[::-1]
    except (OSError, ValueError, NotImplementedError):  # not a valid pattern for pathlib
        files = ()
    if not files:
        raise SpecError(f"corpus {path!r}: no such file or folder, and no file matches it as a pattern")
    return CorpusSource(name=path, files=files, text_field=text_field, strict=True)


def read_documents(source: CorpusSource, skipped: Counter[str]) -> Iterator[tuple[str, str | IdArray]]:
    """Documents in order, as (name, text) or (name, token ids); ``skipped`` counts skipped documents by reason.

    JSONL files hold one document per line; ``.npy`` files hold token ids, with ``.offsets.npy`` next to them; any other
    file is one document of UTF-8 text. Raises SpecError naming the wrong file and line.
    """
    for file in source.files:
        try:
            if file.suffix in JSONL_SUFFIXES:
                yield from _read_jsonl(file, source.text_field, skipped)
            elif file.suffix == ARRAY_SUFFIX:
                yield from _read_arrays(file, source.strict, skipped)
            else:
                yield from _read_text(file, source.strict, skipped)
        except OSError as error:
            raise SpecError(f"{file}: cannot be read ({error.strerror or error})") from None


def _standard_library(root: Path, text_field: str) -> CorpusSource:
    name = f"source files of Python {sys.version_info.major}.{sys.version_info.minor}'s standard library"
    files = tuple(file for file in _walk(root, _LIBRARY_SKIPS) if file.suffix == ".py") if root.is_dir() else ()
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes < MIN_LIBRARY_BYTES:
        raise SpecError(
            f"{name}: only {num_bytes} bytes of .py files in {root}, not enough to train on; "
            "name a corpus with --data PATH"
        )
    return CorpusSource(name=name, files=files, text_field=text_field)


def _walk(root: Path, skip_folders: frozenset[str]) -> Iterator[Path]:
    """Visible regular files below ``root``, sorted within each folder; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise SpecError(f"{error.filename}: cannot be listed ({error.strerror})")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(
            name for name in subfolders
            if not name.startswith(".") and name != "__pycache__" and name not in skip_folders
        )
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _not_empty(source: CorpusSource) -> CorpusSource:
    if not source.files:
        raise SpecError(f"corpus {source.name!r}: the folder holds no visible file")
    return source


def _read_text(file: Path, strict: bool, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if strict:
            raise SpecError(f"{file}: not UTF-8 text (byte {error.start})") from None
        skipped["files that are not UTF-8 text"] += 1
        return
    if "\0" in text:  # valid UTF-8, but no text contains NUL
        if strict:
            raise SpecError(f"{file}: a binary file, not text (NUL at character {text.index(chr(0))})")
        skipped["files that are not UTF-8 text"] += 1
    elif text:
        yield str(file), text
    else:
        skipped["empty documents"] += 1


def _read_jsonl(file: Path, text_field: str, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise SpecError(f"{where}: not a line of JSON ({error})") from None
            text = _field_of(record, text_field, where)
            if not text:
                skipped["empty documents"] += 1
                continue
            if not _is_unicode(text):
                skipped["documents with lone surrogates, replaced by '?'"] += 1
                text = text.encode("utf-8", "replace").decode("utf-8")
            yield where, text


def _field_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise SpecError(f"{where}: expected a JSON object with the key {text_field!r}, got {type(record).__name__}")
    if text_field not in record:
        raise SpecError(f"{where}: no key {text_field!r}{suggest(text_field, record)}; set data.text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise SpecError(f"{where}: {text_field!r} must be text, got {type(text).__name__}")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_arrays(file: Path, strict: bool, skipped: Counter[str]) -> Iterator[tuple[str, IdArray]]:
    offsets_file = file.with_name(file.name.removesuffix(ARRAY_SUFFIX) + OFFSETS_SUFFIX)
    if not offsets_file.is_file():
        if not strict:
            skipped["files that are not UTF-8 text"] += 1
            return
        raise SpecError(f"{file}: token ids need {offsets_file.name} beside them (where each document starts and ends)")
    ids, offsets = load_array(file), load_array(offsets_file)
    check_offsets(offsets, num_tokens=len(ids), where=str(offsets_file))
    for index in range(len(offsets) - 1):
        document = ids[int(offsets[index]):int(offsets[index + 1])]
        if len(document):
            yield f"{file}[{index}]", document
        else:
            skipped["empty documents"] += 1


def load_array(file: Path) -> IdArray:
    """A one-dimensional integer .npy, memory-mapped, without pickle. Raises SpecError naming the file."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SpecError(f"{file}: not a whole .npy file of numbers ({error})") from None
    except OSError as error:
        raise SpecError(f"{file}: cannot be read ({error.strerror or error})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise SpecError(f"{file}: expected one row of integers")
    return array


def check_offsets(offsets: IdArray, *, num_tokens: int, where: str) -> None:
    """Raise SpecError unless offsets start at 0, never decrease, and end at the last token."""
    if len(offsets) == 0 or offsets[0] != 0:
        raise SpecError(f"{where}: the first offset must be 0")
    if np.any(offsets[1:] < offsets[:-1]):
        place = int(np.argmax(offsets[1:] < offsets[:-1])) + 1
        raise SpecError(f"{where}: offsets must not decrease (offset {place} is less than the previous one)")
    if offsets[-1] != num_tokens:
        raise SpecError(f"{where}: the last offset is {offsets[-1]}, but there are {num_tokens} token ids")
