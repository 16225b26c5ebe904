"""The disk below the host: one file per rank, written behind and read ahead by one worker thread.

Plain reads and writes at offsets, no memory map: pages of a map count as this process's memory, and an input/output
error in one arrives as a signal that kills the process without saying which file. The page cache is given back as we
go, so that host memory really stays free. The file has no name after it is opened: however the process ends, SIGKILL
included, the space is free again and nothing is left for a restart to trip over.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from memory.ledger import MemoryFullError, MemoryLedger
from memory.tiers import Places, Stored, TierError, Transfer, flat_bytes
from planner.units import MIB, format_bytes

DISK = "disk"
_ALIGNMENT_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GIVE_BACK_BYTES = 64 * MIB
"""Written bytes after which they are flushed and dropped from the page cache."""


@dataclass(frozen=True, slots=True)
class _FileCopy:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


class DiskTier:
    """``capacity_bytes`` of disk in ``path``, reserved when made. CPU tensors only.

    Raises MemoryFullError where the disk has not that much room, TierError where the file cannot be made and, from
    ``Transfer.wait``, where a read or write failed. All name the file.
    """

    name = DISK

    def __init__(self, path: Path, capacity_bytes: int, ledger: MemoryLedger) -> None:
        self._path = path
        self._places = Places(DISK, capacity_bytes, ledger, alignment_bytes=_ALIGNMENT_BYTES)
        self._file = _open_reserved(path, capacity_bytes)
        self._descriptor = self._file.fileno()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-tier")
        self._dirty_bytes = 0  # of the worker thread
        self.written_bytes = 0
        self.read_bytes = 0

    def store(self, source: torch.Tensor) -> Stored:
        data = flat_bytes(source)
        offset = self._places.take(data.numel())
        self.written_bytes += data.numel()
        return Stored(offset, data.numel(), self._start(self._write, data, offset))

    def load(self, stored: Stored, into: torch.Tensor) -> Transfer:
        data = flat_bytes(into)
        if data.numel() != stored.num_bytes:
            raise ValueError(f"{stored.num_bytes} bytes were stored, {data.numel()} are asked for")
        self.read_bytes += data.numel()
        return self._start(self._read, data, stored.offset)

    def release(self, stored: Stored) -> None:
        self._places.give(stored)

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        self._file.close()

    def _start(self, work: Callable[[memoryview, int], None], data: torch.Tensor, offset: int) -> Transfer:
        # the view keeps the tensor's memory alive until the worker is done with it
        view: memoryview = data.numpy().data
        return _FileCopy(self._worker.submit(work, view, offset))

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                count = os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                raise self._failure("write", offset + done, error.strerror or str(error)) from error
            done += count
        self._dirty_bytes += done
        if self._dirty_bytes >= _GIVE_BACK_BYTES:
            self._give_back()

    def _read(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._descriptor, [data[done:]], offset + done)
            except OSError as error:
                raise self._failure("read", offset + done, error.strerror or str(error)) from error
            if not count:
                raise self._failure("read", offset + done, f"the file ends {len(data) - done} bytes too early")
            done += count
        os.posix_fadvise(self._descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)

    def _give_back(self) -> None:
        """Only pages that are on the disk can leave the page cache, so they are flushed first."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failure("write", 0, error.strerror or str(error)) from error
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty_bytes = 0

    def _failure(self, what: str, offset: int, why: str) -> TierError:
        return TierError(f"disk tier {self._path}: {what} at byte {offset} failed: {why}")


def _open_reserved(path: Path, capacity_bytes: int) -> FileIO:
    """A file of this size whose blocks are reserved, already without a name."""
    free_bytes = free_disk_bytes(path)
    file = None
    try:
        if capacity_bytes > free_bytes:  # known to fail: do not fill the disk to find out
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w+b", buffering=0)
        path.unlink()
        os.posix_fallocate(file.fileno(), 0, max(capacity_bytes, 1))
    except OSError as error:
        if file is not None:
            file.close()
        text = f"disk tier {path}: cannot reserve {format_bytes(capacity_bytes)}: {error.strerror}"
        if error.errno not in _NO_ROOM:
            raise TierError(text) from error
        raise MemoryFullError(
            f"{text} (free on this disk: {format_bytes(free_bytes)}); use a folder with more room, a smaller "
            "--memory.tier-budget or a smaller --swap-fraction",
            account=DISK, needed_bytes=capacity_bytes, available_bytes=free_bytes,
        ) from error
    return file


def free_disk_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write on the file system of ``path`` (which need not exist)."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        facts = os.statvfs(folder)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize
