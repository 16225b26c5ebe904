"""Tokenised documents on disk, memory-mapped, and the samples cut from them.

A store is a folder: ``tokens.npy`` (the ids of all documents in order, uint16 or uint32), ``offsets.npy`` (int64, the
start of each document, and the end) and ``meta.json``. A document is its tokens plus the end-of-document id. Stores are
built under a temporary name and then renamed, so a store is always complete, even if several processes build it at
once. Its name is a fingerprint of the files and the tokenizer, so a changed file gives a new store.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from planner.codec import from_plain, to_plain
from planner.errors import SpecError
from trainer.data.corpus import (
    ARRAY_SUFFIX,
    OFFSETS_SUFFIX,
    CorpusSource,
    IdArray,
    check_offsets,
    find_corpus,
    load_array,
    read_documents,
)
from trainer.data.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from trainer.settings.tree import DataConfig

STORE_SCHEMA = 1
TOKENS_FILE, OFFSETS_FILE, META_FILE = "tokens.npy", "offsets.npy", "meta.json"

_FLUSH_TOKENS = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMeta:
    """What a store holds and where it came from. ``skipped`` counts skipped documents by reason."""

    schema: int
    corpus: str
    tokenizer: str
    vocab_size: int
    eod_id: int
    fingerprint: str
    num_documents: int
    num_tokens: int
    unigram_entropy_nats: float
    skipped: dict[str, int]


class TokenStore:
    """Read access to a store folder. Reads only the requested bytes."""

    def __init__(self, folder: Path) -> None:
        """Raises SpecError, naming the file, if the store is incomplete."""
        self.folder = folder
        self.meta = _read_meta(folder / META_FILE)
        try:
            self._tokens = load_array(folder / TOKENS_FILE)
            self._offsets = np.array(load_array(folder / OFFSETS_FILE), dtype=np.int64)
            check_offsets(self._offsets, num_tokens=len(self._tokens), where=str(folder / OFFSETS_FILE))
        except SpecError as error:
            raise SpecError(f"{error}; a damaged token store: delete {folder} and build it again") from None
        counts = (len(self._offsets) - 1, len(self._tokens))
        if counts != (self.meta.num_documents, self.meta.num_tokens):
            raise SpecError(f"{folder}: {META_FILE} does not belong to these tokens; delete the folder, build it again")

    @property
    def num_documents(self) -> int:
        return self.meta.num_documents

    @property
    def num_tokens(self) -> int:
        return self.meta.num_tokens

    @property
    def vocab_size(self) -> int:
        return self.meta.vocab_size

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of ids per document, with the end-of-document id [num_documents]."""
        return np.diff(self._offsets)

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """All ids of one document."""
        return self.read(index, 0, int(self._offsets[index + 1] - self._offsets[index]))

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids ``start <= i < stop`` of one document. Raises IndexError outside it, SpecError for impossible ids."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        first, end = int(self._offsets[document]), int(self._offsets[document + 1])
        if not 0 <= start <= stop <= end - first:
            raise IndexError(f"ids {start}..{stop} of document {document}, which has {end - first}")
        ids = np.array(self._tokens[first + start:first + stop], dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise SpecError(f"{self.folder / TOKENS_FILE}: damaged, document {document} holds an id outside the "
                            f"vocabulary of {self.vocab_size}; delete the folder and build it again")
        return ids

    def describe(self) -> tuple[str, ...]:
        """Lines for the log: what the store holds, and what was skipped."""
        meta = self.meta
        lines = [f"corpus: {meta.corpus}: {meta.num_documents:,} documents, {meta.num_tokens:,} tokens "
                 f"({meta.tokenizer} tokenizer, vocabulary {meta.vocab_size:,})"]
        lines.extend(f"corpus: {count:,} {reason}" for reason, count in sorted(meta.skipped.items()))
        return tuple(lines)


def open_store(data: DataConfig, cache_root: Path) -> TokenStore:
    """The tokenised corpus of ``data``, built on first use in ``data.cache_dir``, or in ``cache_root`` if that is None.

    Raises SpecError: no corpus, an unreadable file, a wrong line, a tokenizer that does not fit, a full disk.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if data.path is not None and is_store(Path(data.path)):
        store = TokenStore(Path(data.path))
        if (store.meta.tokenizer, store.vocab_size) != (tokenizer.name, tokenizer.vocab_size):
            raise SpecError(f"{data.path}: tokenised with {store.meta.tokenizer}, but data.tokenizer is "
                            f"{tokenizer.name}; name the same tokenizer file with --tokenizer")
        return store
    source = find_corpus(data.path, text_field=data.text_field)
    fingerprint = _fingerprint(source, tokenizer)
    root = Path(data.cache_dir) if data.cache_dir is not None else cache_root
    folder = root / f"tokens-{fingerprint[:32]}"
    if not folder.is_dir():
        try:
            _build(folder, source, tokenizer, fingerprint)
        except OSError as error:
            raise SpecError(f"token cache {root}: cannot be written ({error.strerror or error})") from None
    return TokenStore(folder)


def is_store(folder: Path) -> bool:
    """Whether this folder is a token store, complete or not."""
    return (folder / META_FILE).is_file() and any((folder / name).is_file() for name in (TOKENS_FILE, OFFSETS_FILE))


def unigram_entropy_nats(counts: npt.NDArray[np.int64]) -> float:
    """Entropy of the token frequencies: the loss of the best model that ignores context. 0 for no tokens."""
    used = counts[counts > 0].astype(np.float64)
    if not len(used):
        return 0.0
    shares = used / used.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleIndex:
    """The training samples. Sample i predicts ``num_tokens[i]`` tokens, starting at id ``start[i]`` of document
    ``document[i]``. Predicting n tokens needs n + 1 ids (inputs ``ids[:-1]``, labels ``ids[1:]``), so adjacent pieces
    of a split document share one id, and every id but a document's first is predicted once.
    """

    document: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    max_length: int
    num_short: int
    num_split: int
    num_dropped: int
    num_dropped_tokens: int

    def __len__(self) -> int:
        return len(self.document)

    def describe(self) -> tuple[str, ...]:
        """Lines for the log: samples, and the effect of the length limit."""
        lines = [f"samples: {len(self):,} of at most {self.max_length:,} tokens, "
                 f"{int(self.num_tokens.sum()):,} predicted tokens in all"]
        if self.num_split:
            lines.append(f"samples: {self.num_split:,} documents longer than that were split")
        if self.num_dropped:
            lines.append(f"samples: {self.num_dropped:,} documents longer than that were dropped "
                         f"({self.num_dropped_tokens:,} tokens)")
        if self.num_short:
            lines.append(f"samples: {self.num_short:,} documents of fewer than 2 ids were skipped")
        return tuple(lines)


def build_sample_index(lengths: npt.NDArray[np.int64], *, max_length: int, over_length: str) -> SampleIndex:
    """Cut documents of these lengths (in ids) into samples, in document order. ``over_length``: ``split`` or ``drop``.

    Raises SpecError if no sample is left.
    """
    if max_length < 1 or over_length not in ("split", "drop"):
        raise SpecError(f"max_length {max_length} and over_length {over_length!r}: expected 1 or more, split or drop")
    predicted = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    too_long = predicted > max_length
    kept = predicted if over_length == "split" else np.where(too_long, 0, predicted)
    num_pieces = -(-kept // max_length)
    document = np.repeat(np.arange(len(predicted), dtype=np.int64), num_pieces)
    if not len(document):
        raise SpecError(f"no sample is left: all {len(predicted)} documents are empty or longer than data.max_length "
                        f"({max_length}) with data.over_length {over_length}")
    piece = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = piece * max_length
    dropped = too_long if over_length == "drop" else np.zeros_like(too_long)
    return SampleIndex(
        document=document,
        start=start,
        num_tokens=np.minimum(kept[document] - start, max_length),
        max_length=max_length,
        num_short=int((predicted == 0).sum()),
        num_split=int(too_long.sum()) if over_length == "split" else 0,
        num_dropped=int(dropped.sum()),
        num_dropped_tokens=int(np.asarray(lengths)[dropped].sum()),
    )


def _read_meta(path: Path) -> StoreMeta:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not a complete token store ({error}); delete its folder to build it again") from None
    if not isinstance(data, dict) or data.get("schema") != STORE_SCHEMA:
        raise SpecError(f"{path}: not a token store of version {STORE_SCHEMA}")
    return from_plain(StoreMeta, data, where=str(path))


def _fingerprint(source: CorpusSource, tokenizer: TextTokenizer) -> str:
    """sha256 of everything that determines a store's content; files by path, size and modification time."""
    files: list[Any] = []
    for file in source.files:
        beside = file.with_name(file.name.removesuffix(ARRAY_SUFFIX) + OFFSETS_SUFFIX)
        for part in (file, beside) if file.suffix == ARRAY_SUFFIX else (file,):
            try:
                status = part.stat()
            except OSError as error:
                raise SpecError(f"{part}: cannot be read ({error.strerror})") from None
            files.append((str(part.absolute()), status.st_size, status.st_mtime_ns))
    identity = [STORE_SCHEMA, source.text_field, tokenizer.name, tokenizer.vocab_size, tokenizer.eod_id, files]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _build(folder: Path, source: CorpusSource, tokenizer: TextTokenizer, fingerprint: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        draft = Path(temporary, "store")
        draft.mkdir()
        meta = _write_tokens(draft, source, tokenizer, fingerprint)
        with (draft / META_FILE).open("w", encoding="utf-8") as file:
            json.dump(to_plain(meta), file, indent=1)
            _flush_to_disk(file.fileno(), file.flush)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and its store is the same
                raise


def _write_tokens(draft: Path, source: CorpusSource, tokenizer: TextTokenizer, fingerprint: str) -> StoreMeta:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    offsets, skipped, waiting = array("q", [0]), Counter[str](), array(dtype.char)
    with (draft / TOKENS_FILE).open("wb") as file:
        _write_header(file, dtype, 0)
        for name, document in read_documents(source, skipped):
            ids = tokenizer.encode(document) if isinstance(document, str) else _checked(document, name, tokenizer)
            if not len(ids):
                skipped["empty documents"] += 1
                continue
            waiting.frombytes(ids.astype(dtype).tobytes())
            if ids[-1] != tokenizer.eod_id:
                waiting.append(tokenizer.eod_id)
            offsets.append(offsets[-1] + len(ids) + int(ids[-1] != tokenizer.eod_id))
            if len(waiting) >= _FLUSH_TOKENS:
                _drain(waiting, file, dtype, counts)
        _drain(waiting, file, dtype, counts)
        if len(offsets) == 1:
            left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            raise SpecError(f"corpus {source.name}: no document with text in {len(source.files)} files"
                            + (f" ({left_out})" if left_out else ""))
        file.seek(0)
        _write_header(file, dtype, offsets[-1])
        _flush_to_disk(file.fileno(), file.flush)
    with (draft / OFFSETS_FILE).open("wb") as file:
        np.save(file, np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)
        _flush_to_disk(file.fileno(), file.flush)
    return StoreMeta(
        schema=STORE_SCHEMA, corpus=source.name, tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id, fingerprint=fingerprint, num_documents=len(offsets) - 1, num_tokens=offsets[-1],
        unigram_entropy_nats=unigram_entropy_nats(counts), skipped=dict(skipped),
    )


def _checked(ids: IdArray, name: str, tokenizer: TextTokenizer) -> IdArray:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise SpecError(f"{name}: holds token id {low if low < 0 else high}, but the tokenizer ({tokenizer.name}) has "
                        f"ids 0 .. {tokenizer.vocab_size - 1}; name the tokenizer of these ids with --tokenizer")
    return ids


def _drain(waiting: array[int], file: BinaryIO, dtype: np.dtype[Any], counts: npt.NDArray[np.int64]) -> None:
    """Append the waiting ids to the file, count them and clear the buffer."""
    counts += np.bincount(np.frombuffer(waiting, dtype=dtype), minlength=len(counts))
    file.write(waiting.tobytes())
    del waiting[:]


def _write_header(file: BinaryIO, dtype: np.dtype[Any], num_tokens: int) -> None:
    """Write a header of constant size: numpy pads it so that the first dimension can grow in place."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_tokens,)}
    )


def _flush_to_disk(descriptor: int, flush: Any) -> None:
    flush()
    os.fsync(descriptor)
