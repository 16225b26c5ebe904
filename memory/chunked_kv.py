"""K/V of earlier chunks and the gradients that later chunks accumulate for them, for all layers of one group.

Shapes: S stored rows, G rows whose gradients are carried, K KV heads of this rank, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from memory.chunked import Rows


@dataclass(slots=True)
class ChunkStore:
    """One K/V buffer and one dK/dV buffer per layer, allocated on first use, with the rows that
    ``memory.chunked.place_rows`` assigns. dK/dV are at least fp32 for any K/V dtype, as many chunks add to them."""

    num_rows: int
    num_carried: int
    _kv: dict[int, torch.Tensor] = field(default_factory=dict)
    _dkv: dict[int, torch.Tensor] = field(default_factory=dict)

    def prepare(self, layer: int, rows: Rows, carried: Rows, following: int | None) -> None:
        """Does nothing: all rows are on the device."""

    def write(self, layer: int, rows: Rows, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Store the K/V of these rows."""
        if layer not in self._kv:
            self._kv[layer] = k_TKH.new_empty((self.num_rows, 2, *k_TKH.shape[1:]))
        place = self._kv[layer][rows[0] : rows[1]]
        place[:, 0], place[:, 1] = k_TKH, v_TKH

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All stored K and V ``[S, K, H]`` of a layer; only rows that were written are valid."""
        kv_S2KH = self._kv[layer]
        return kv_S2KH[:, 0], kv_S2KH[:, 1]

    def add_gradients(
        self, layer: int, rows: Rows, dk_TKH: torch.Tensor, dv_TKH: torch.Tensor
    ) -> None:
        """Add one chunk's gradients to the carried rows ``rows``."""
        if layer not in self._dkv:
            wide = torch.promote_types(dk_TKH.dtype, torch.float32)
            self._dkv[layer] = dk_TKH.new_zeros((self.num_carried, 2, *dk_TKH.shape[1:]), dtype=wide)
        place = self._dkv[layer][rows[0] : rows[1]]
        place[:, 0] += dk_TKH
        place[:, 1] += dv_TKH

    def gradients(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(dK, dV) that later chunks accumulated for these rows; None if there are none."""
        if layer not in self._dkv:
            return None
        place = self._dkv[layer][rows[0] : rows[1]]
        return place[:, 0], place[:, 1]

    def close(self) -> None:
        """Free all rows. The store cannot be used afterwards."""
        self._kv.clear()
        self._dkv.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in (*self._kv.values(), *self._dkv.values()))
