"""The memory blocks behind one layer's saved tensors, and how each is swapped, kept or dropped and then restored.

A block is one tensor storage that the layer's backward reads through views. Blocks that hold one record per token are
split by rows: the first rows are swapped to the tier, the next rows are kept, the rest is dropped and recomputed. All
other blocks are split by elements or not at all, into swapped and kept; they are never recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memory.tiers import Stored, Tier, Transfer
from memory.timeline import waiting


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of a block. Row-wise views have the block's rows as their first dimension."""

    block: Block
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, block: Block) -> View:
        return cls(block, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def on(self, base: torch.Tensor) -> torch.Tensor:
        return base.as_strided(self.size, self.stride, self.offset)


class Block:
    """One storage. ``base`` covers all of it while it is on the device: ``[rows, elements per row]``, or ``[1, all]``
    for an unsplit block. ``num_uses``: how many reads are still to come."""

    __slots__ = ("base", "num_rows", "num_kept", "num_swapped", "num_uses", "shape", "_dtype", "_device", "_kept",
                 "_loading", "_stored")

    def __init__(self, base: torch.Tensor) -> None:
        self.base: torch.Tensor | None = base
        self.shape = tuple(base.shape)
        self.num_rows = self.shape[0]
        self.num_swapped = 0
        self.num_kept = self.num_rows
        self.num_uses = 0
        self._dtype, self._device = base.dtype, base.device
        self._kept: torch.Tensor | None = None
        self._stored: Stored | None = None
        self._loading: Transfer | None = None

    @property
    def num_held(self) -> int:
        """Rows that are swapped or kept, and so need no recomputation."""
        return self.num_swapped + self.num_kept

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def put_away(self, num_swapped: int, num_kept: int, tier: Tier | None) -> Transfer | None:
        """Free all but ``num_kept`` rows on the device. Keep the old base until the returned copy is done."""
        assert self.base is not None
        self.num_swapped, self.num_kept = num_swapped, num_kept
        if num_kept == self.num_rows:
            return None
        if num_swapped:
            assert tier is not None
            self._stored = tier.store(self.base[:num_swapped])
        if num_kept:
            self._kept = self.base[num_swapped : self.num_held].clone()
        self.base = None
        return self._stored.transfer if self._stored is not None else None

    def start_load(self, tier: Tier | None) -> None:
        """Start loading the swapped rows into a new base with room for all rows. A second call does nothing."""
        if self._stored is None or self._loading is not None or not self.num_uses:
            return
        assert tier is not None
        self.base = torch.empty(self.shape, dtype=self._dtype, device=self._device)
        self._loading = tier.load(self._stored, self.base[: self.num_swapped])

    def finish_load(self, tier: Tier | None) -> None:
        """Wait until all held rows are in ``base``, which is None if no row is held."""
        self.start_load(tier)
        if self._loading is not None and self._stored is not None:
            assert tier is not None
            with waiting(tier.timeline, "for a copy back"):
                self._loading.wait()
            tier.release(self._stored)
            self._stored, self._loading = None, None
        if self._kept is not None:
            if self.base is None:
                self.base = torch.empty(self.shape, dtype=self._dtype, device=self._device)
            self.base[self.num_swapped : self.num_held] = self._kept
            self._kept = None

    def fill(self, rows: torch.Tensor) -> None:
        """Take the recomputed rows, which follow the held ones. The block is then complete."""
        if self.base is None:
            self.base = rows
        else:
            self.base[self.num_held :] = rows
        self.num_kept = self.num_rows - self.num_swapped

    def drop(self) -> None:
        self.base = None


def whole_base(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of the tensor's storage, ``[1, elements]``. It is a new tensor and not a view: views share a version
    counter, and filling rows must not look to autograd like a change of what it saved."""
    storage = tensor.untyped_storage()
    num_elements = storage.nbytes() // tensor.dtype.itemsize
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, 0, (1, num_elements), (num_elements, 1))


def row_base(tensor: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """The storage as ``[rows, elements per row]``; None if it does not hold one record per row."""
    base = whole_base(tensor)
    row_elements, rest = divmod(base.numel(), num_rows)
    fits = not rest and tensor.dim() > 0 and tensor.shape[0] == num_rows and tensor.storage_offset() < row_elements
    if not fits or (num_rows > 1 and tensor.stride(0) != row_elements):
        return None
    return base.view(num_rows, row_elements)
