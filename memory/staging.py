"""A buffer that data passes through between a tensor on any device and a file."""

from __future__ import annotations

import torch


class Staging:
    """A buffer of ``num_bytes`` for one worker thread, aligned for direct reads and writes. On CUDA it is pinned, and
    copies run on their own stream. On every device a copy has finished when the call returns."""

    def __init__(self, num_bytes: int, device: torch.device, *, alignment_bytes: int) -> None:
        on_cuda = device.type == "cuda"
        self._device = device
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        whole = torch.empty(num_bytes + alignment_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        start = -whole.data_ptr() % alignment_bytes
        self._buffer = whole[start : start + num_bytes]
        self.bytes: memoryview = self._buffer.numpy().data

    def mark(self) -> torch.cuda.Event | None:
        """The computing stream's current position, for ``wait``. Call it on the computing thread."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Make later copies wait for everything queued on the computing stream before ``mark``: it computes the source
        of copies out, and may still read memory that copies back will fill."""
        if self.stream is not None and mark is not None:
            self.stream.wait_event(mark)

    def take(self, piece: torch.Tensor) -> None:
        """Copy these bytes to the beginning of the buffer."""
        self._copy(self._buffer[: piece.numel()], piece)

    def give(self, piece: torch.Tensor) -> None:
        """Fill ``piece`` from the beginning of the buffer."""
        self._copy(piece, self._buffer[: piece.numel()])

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.stream.synchronize()
