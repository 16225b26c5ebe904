"""Buffers for activations that come back, used again from layer to layer: MEMO's rounding buffers, for CPU.

Every layer of a microbatch asks for buffers of the same sizes, so a buffer of the layer whose backward is over serves
the layer that is to be read next. Made anew they cost a page fault for every page. Nothing is planned or guessed: a
buffer is handed out again only when the last tensor over it is gone, whoever holds that (autograd often longer than the
block that asked for it), and only for the same number of bytes. On CUDA torch's allocator does the same.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch


class BufferArena:
    """Of one microbatch. ``made_bytes``: of all buffers ever made; ``num_taken`` tensors were asked for, ``num_reused``
    of them got a buffer that had served before."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}  # by bytes
        self._is_open = True
        self.made_bytes = 0
        self.num_taken = 0
        self.num_reused = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor."""
        self.num_taken += 1
        num_bytes = math.prod(shape) * dtype.itemsize
        free = self._free.get(num_bytes)
        if free:
            self.num_reused += 1
            buffer = free.pop()
        else:
            self.made_bytes += num_bytes
            if device.type != "cpu" or not num_bytes:
                return torch.empty(shape, dtype=dtype, device=device)
            buffer = torch.empty(num_bytes, dtype=torch.uint8).numpy()
        window = buffer[:]  # lives as long as any tensor over it, in whatever thread the last one dies
        weakref.finalize(window, self._give, buffer).atexit = False
        return torch.from_numpy(window).view(dtype).view(shape)

    def close(self) -> None:
        """Nothing will be used again: what is free is given back now, the rest as it becomes free."""
        self._is_open = False
        self._free.clear()

    def _give(self, buffer: np.ndarray) -> None:
        if self._is_open:
            self._free.setdefault(buffer.nbytes, []).append(buffer)
