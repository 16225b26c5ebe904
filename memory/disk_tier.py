"""The disk tier: one file per rank, written by one worker thread and read ahead of use by another.

Reads and writes are direct (O_DIRECT) where the file system supports it. They bypass the page cache, so host memory
stays free and nothing needs flushing, which is several times faster than writing through the cache. Direct access needs
aligned memory, so all data passes through one small buffer per thread (``memory.staging``), which is also pinned for
copies to and from a CUDA device. Elsewhere pages are dropped from the page cache as the copy proceeds. A memory map is
not used: its pages count as this process's memory, and an input/output error would be a signal that kills the process
without naming the file. The file is unlinked right after it is opened, so its space is freed however the process ends,
even by SIGKILL, and nothing is left over for a restart.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from memory.ledger import MemoryFullError, MemoryLedger
from memory.staging import Staging
from memory.tiers import Stored, Tier, TierError, Transfer
from planner.measured.copy_times import BACK, OUT
from planner.units import MIB, format_bytes

DISK = "disk"
_CPU = torch.device("cpu")
_ALIGNMENT_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PIECE_BYTES = 4 * MIB
"""Size of one direct read or write, and of each thread's buffer."""
_GIVE_BACK_BYTES = 64 * MIB
"""Without direct writes: after this many bytes, written pages are flushed and dropped from the page cache."""


@dataclass(frozen=True, slots=True)
class _FileCopy:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


class DiskTier(Tier):
    """``capacity_bytes`` of disk in ``path``, reserved at creation, for tensors on ``device``. ``direct``: bypass the
    page cache where the file system can. On CUDA ``Transfer.wait`` blocks the host until the copy is done, because the
    disk is the bottleneck.

    Raises MemoryFullError if the disk has too little space, and TierError if the file cannot be created or, from
    ``Transfer.wait``, if a read or write failed. Every message names the file.
    """

    name = DISK

    def __init__(
        self, path: Path, capacity_bytes: int, ledger: MemoryLedger, *, device: torch.device = _CPU, direct: bool = True
    ) -> None:
        super().__init__(capacity_bytes, ledger, alignment_bytes=_ALIGNMENT_BYTES)
        self._path = path
        self._file = _open_reserved(path, capacity_bytes)
        self._descriptor = self._file.fileno()
        self.is_direct = direct and capacity_bytes >= _ALIGNMENT_BYTES and _make_direct(self._descriptor)
        self._unit_bytes = _ALIGNMENT_BYTES if self.is_direct else 1
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-tier-write")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-tier-read")
        self._is_staged = self.is_direct or device.type == "cuda"
        self._out, self._in = (
            Staging(_PIECE_BYTES if self._is_staged else 0, device, alignment_bytes=_ALIGNMENT_BYTES) for _ in range(2)
        )
        self._dirty_bytes = 0  # used by the writing thread only

    def close(self) -> None:
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._file.close()

    def _write_behind(self, data: torch.Tensor, offset: int) -> Transfer:
        return self._start(self._writer, self._out, OUT, self._write, data, offset)

    def _read_ahead(self, stored: Stored, data: torch.Tensor) -> Transfer:
        return self._start(self._reader, self._in, BACK, self._read, data, stored.offset, stored.transfer)

    def _start(
        self, worker: ThreadPoolExecutor, staging: Staging, lane: str, work: Callable[[torch.Tensor, int], None],
        data: torch.Tensor, offset: int, after: Transfer | None = None,
    ) -> Transfer:
        timeline, mark = self.timeline, staging.mark()
        subject = timeline.subject if timeline is not None else ""

        def copy() -> None:
            if after is not None:
                after.wait()  # another thread writes this place: wait until it is done before reading
            staging.wait(mark)
            start = timeline.stamp(staging.stream) if timeline is not None else None
            work(data, offset)
            if timeline is not None:
                timeline.add(lane, subject, start, data.numel(), timeline.stamp(staging.stream))

        return _FileCopy(worker.submit(copy))

    def _write(self, data: torch.Tensor, offset: int) -> None:
        if self._is_staged:
            for start in range(0, data.numel(), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                self._out.take(piece)
                self._put(self._out.bytes[: self._rounded_up(piece.numel())], offset + start)
        else:
            self._put(data.numpy().data, offset)
        if not self.is_direct:
            self._dirty_bytes += data.numel()
            if self._dirty_bytes >= _GIVE_BACK_BYTES:
                self._give_back()

    def _read(self, data: torch.Tensor, offset: int) -> None:
        if self._is_staged:
            for start in range(0, data.numel(), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                num_bytes = piece.numel()
                self._get(self._in.bytes[: self._rounded_up(num_bytes)], offset + start, num_bytes)
                self._in.give(piece)
        else:
            self._get(data.numpy().data, offset, data.numel())
        if not self.is_direct:
            os.posix_fadvise(self._descriptor, offset, data.numel(), os.POSIX_FADV_DONTNEED)

    def _put(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``. After a short write, continue at the last whole unit that was written."""
        done = 0
        while done < len(view):
            try:
                count = os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                raise self._failure("write", offset + done, error.strerror or str(error)) from error
            if done + count == len(view):
                return
            whole = (done + count) // self._unit_bytes * self._unit_bytes
            if whole == done:
                raise self._failure("write", offset + done, f"only {count} of {len(view) - done} bytes were taken")
            done = whole

    def _get(self, view: memoryview, offset: int, needed: int) -> None:
        """Read at least ``needed`` bytes into ``view``."""
        done = 0
        while done < needed:
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failure("read", offset + done, error.strerror or str(error)) from error
            got = done + count
            whole = got // self._unit_bytes * self._unit_bytes
            if got < needed and whole == done:
                raise self._failure("read", offset + got, f"the file ends {needed - got} bytes too early")
            done = got if got >= needed else whole

    def _give_back(self) -> None:
        """Flush pages, then drop them: the page cache can only drop pages that are on the disk."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failure("write", 0, error.strerror or str(error)) from error
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty_bytes = 0

    def _rounded_up(self, num_bytes: int) -> int:
        return -(-num_bytes // self._unit_bytes) * self._unit_bytes

    def _failure(self, what: str, offset: int, why: str) -> TierError:
        return TierError(f"disk tier {self._path}: {what} at byte {offset} failed: {why}")


def _open_reserved(path: Path, capacity_bytes: int) -> FileIO:
    """A file of this size with its blocks reserved, already unlinked."""
    free_bytes = free_disk_bytes(path)
    file = None
    try:
        if capacity_bytes > free_bytes:  # reserving would fail only after it has filled the disk
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
            f"{text} (free on this disk: {format_bytes(free_bytes)}); use a folder with more room or a smaller "
            "--memory.tier-budget (with --memory swap also a smaller --swap-fraction)",
            account=DISK, needed_bytes=capacity_bytes, available_bytes=free_bytes,
        ) from error
    return file


def _make_direct(descriptor: int) -> bool:
    """Switch the file to direct reads and writes; False if the file system does not support them. Some file systems
    report that only at the first access, so one block is written; the file has at least one."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag)
        with mmap.mmap(-1, _ALIGNMENT_BYTES) as block:
            os.pwrite(descriptor, block, 0)
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def free_disk_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the file system of ``path``, which need not exist."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        facts = os.statvfs(folder)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize
