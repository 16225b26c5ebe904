"""Text to token ids: built-in byte tokenizer, or a file of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from planner.errors import SpecError

if TYPE_CHECKING:
    import tokenizers

TokenIds = npt.NDArray[np.unsignedinteger]

_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


class TextTokenizer(Protocol):
    """What the data path needs of a tokenizer. ``name``: identifies it in the cache of tokenised text."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...

    def encode(self, text: str) -> TokenIds: ...


class ByteTokenizer:
    """One id per UTF-8 byte; id 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> TokenIds:
        """uint16 ids [num_bytes]. ``text`` must be valid Unicode (no lone surrogates)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)


class FileTokenizer:
    """A ``tokenizer.json``. A document ends with the file's own end token, or else with one extra id after its last."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, name: str) -> None:
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise SpecError(f"tokenizer {name}: it has no tokens")
        next_id = max(ids.values()) + 1
        self.name = name
        self.eod_id = _first_known(ids, _END_NAMES, default=next_id)
        self.vocab_size = max(next_id, self.eod_id + 1)
        self._tokenizer = tokenizer

    def encode(self, text: str) -> TokenIds:
        """uint32 ids [num_tokens], without the special tokens a chat template would add."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def load_tokenizer(path: str | None) -> TextTokenizer:
    """None: the byte tokenizer. Else a JSON file of the ``tokenizers`` library; raises SpecError naming it."""
    if path is None:
        return ByteTokenizer()
    import tokenizers  # takes 0.1 s, not needed for byte tokens

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"tokenizer {path}: cannot be read ({error.strerror})") from None
    try:
        # from_file raises bare Exception; from_buffer raises ValueError for the same mistakes
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise SpecError(f"tokenizer {path}: not a file of the tokenizers library ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return FileTokenizer(tokenizer, name=f"file-{hashlib.sha256(content).hexdigest()[:32]}")


def _first_known(ids: dict[str, int], names: Iterable[str], *, default: int) -> int:
    for name in names:
        if name in ids:
            return ids[name]
    return default
