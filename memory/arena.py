"""Planned addresses at run time: an allocator that records a microbatch's requests, then serves them from one slab.

``native/arena.cpp`` decides request by request and is always safe: it uses a planned address only if no live block
overlaps it. This module builds it at first use, gives it plans and counts the outcomes. On CUDA it replaces torch's
caching allocator for the whole process (``install_on_cuda``); a ``torch.cuda.MemPool`` would not do, because its
allocator is asked for segments and not for blocks. Requests outside the plan are served from the driver's
stream-ordered pool, the one that torch's backend ``cudaMallocAsync`` uses.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch

from planner.addresses.plan import GREEDY_ONLY, AddressPlan, Request, plan_addresses, requests_from_events
from planner.addresses.rows import RowLines, fit_rows
from planner.errors import LonghaulError, PlanError
from planner.units import format_bytes

_COMPILERS = ("c++", "g++", "clang++")
_NUM_UNITS = 256
"""How many kinds of microbatches are remembered; the least recently used one is dropped."""
_CUDA_FUNCTIONS = (
    "cudaMallocAsync", "cudaFreeAsync", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaStreamWaitEvent",
    "cudaEventDestroy",
)
_RELEASE_THRESHOLD = 4
"""cudaMemPoolAttrReleaseThreshold: how many free bytes the driver's pool keeps instead of releasing them."""

PlanRequests = Callable[[SequenceOf[Request]], AddressPlan]


class ArenaError(LonghaulError):
    """The arena cannot be used: there is no compiler, or CUDA is already in use. The text is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaStats:
    """Counts of all requests so far. ``num_hits``: served at their planned address. ``num_misses``: not the request
    that the plan expected. ``num_refused``: expected, but a live block was in the way. ``num_unplanned``: expected, but
    without an address, because it outlives the microbatch or its size is not known. ``num_outside``: made while no plan
    was active. All but hits were served by the fallback. Bytes count all live blocks with padding, but not the unused
    part of the slab."""

    num_hits: int
    num_misses: int
    num_refused: int
    num_unplanned: int
    num_outside: int
    live_bytes: int
    peak_bytes: int
    slab_bytes: int
    num_failures: int

    @property
    def hit_fraction(self) -> float:
        """Share of the requests in microbatches with a plan that were served at their planned address."""
        served = self.num_hits + self.num_misses + self.num_refused + self.num_unplanned
        return self.num_hits / served if served else 0.0


class ArenaLibrary:
    """The compiled and loaded allocator. Its state belongs to the library file, so load a file once per process.

    Raises ArenaError where there is no C++ compiler or compilation fails.
    """

    def __init__(self, folder: Path) -> None:
        self.path = _build(folder)
        self.functions = ctypes.CDLL(str(self.path))
        integers = ctypes.POINTER(ctypes.c_int64)
        f = self.functions
        f.longhaul_arena_device.argtypes = [ctypes.c_void_p] * len(_CUDA_FUNCTIONS)
        f.longhaul_arena_device.restype = None
        f.longhaul_arena_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        f.longhaul_arena_malloc.restype = ctypes.c_void_p
        f.longhaul_arena_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        f.longhaul_arena_free.restype = None
        f.longhaul_arena_record_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        f.longhaul_arena_record_stream.restype = None
        f.longhaul_arena_begin.argtypes = [integers, integers, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        f.longhaul_arena_end_log.argtypes = [integers, ctypes.c_int64]
        f.longhaul_arena_end_log.restype = ctypes.c_int64
        f.longhaul_arena_stats.argtypes = [integers]

    def use_host_memory(self) -> None:
        """Use malloc and free: for tests, and to replay traces without CUDA."""
        self.functions.longhaul_arena_device(*([None] * len(_CUDA_FUNCTIONS)))

    def begin(self, sizes: SequenceOf[int], offsets: SequenceOf[int], slab_bytes: int, stream: int) -> bool:
        array = ctypes.c_int64 * len(sizes)
        count = len(sizes)
        return bool(self.functions.longhaul_arena_begin(array(*sizes), array(*offsets), count, slab_bytes, stream))

    def end(self) -> None:
        self.functions.longhaul_arena_end()

    def begin_log(self) -> None:
        self.functions.longhaul_arena_begin_log()

    def end_log(self) -> list[tuple[int, int]]:
        """Events in order: ``(block, bytes)`` for an allocation, ``(block, -1)`` for its free."""
        count = self.functions.longhaul_arena_end_log(None, 0)
        array = (ctypes.c_int64 * count)()
        self.functions.longhaul_arena_end_log(array, count)
        return list(zip(array[0::2], array[1::2], strict=True))

    def stats(self) -> ArenaStats:
        array = (ctypes.c_int64 * 9)()
        self.functions.longhaul_arena_stats(array)
        hits, misses, refused, unplanned, outside, live, peak, slab, failures = array
        return ArenaStats(
            num_hits=hits, num_misses=misses, num_refused=refused, num_unplanned=unplanned, num_outside=outside,
            live_bytes=live, peak_bytes=peak, slab_bytes=slab, num_failures=failures,
        )

    def reset_peak(self) -> None:
        self.functions.longhaul_arena_reset_peak()


@dataclass(slots=True)
class _Unit:
    """What is known of one kind of microbatch: its largest trace, and how request sizes depend on the number of rows
    (None: not known yet, so only ``num_rows`` itself can be served). The plan is made when it is first needed."""

    num_rows: int
    requests: tuple[Request, ...]
    num_events: int
    lines: RowLines | None = None
    offsets: tuple[int, ...] = ()
    slab_bytes: int = 0

    def covers(self, num_rows: int) -> bool:
        return num_rows == self.num_rows or (self.lines is not None and num_rows <= self.num_rows)

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        if num_rows == self.num_rows or self.lines is None:
            return tuple(request.num_bytes for request in self.requests)
        return self.lines.sizes(num_rows)

    def plan(self, plan_requests: PlanRequests) -> None:
        """Blocks that outlive the microbatch, such as gradients, get no address, which the next one would need."""
        inside = [index for index, request in enumerate(self.requests) if request.stop < self.num_events]
        plan = plan_requests([self.requests[index] for index in inside])
        places = dict(zip(inside, plan.offsets, strict=True))
        self.offsets = tuple(places.get(index, -1) for index in range(len(self.requests)))
        self.slab_bytes = plan.peak_bytes


def _greedy(requests: SequenceOf[Request]) -> AddressPlan:
    return plan_addresses(requests, GREEDY_ONLY)


@dataclass(slots=True)
class AddressArena:
    """Call ``begin`` and ``end`` around each microbatch's forward and backward.

    ``key`` names the kind of microbatch: equal keys promise the same sequence of requests, with sizes that depend on
    the number of rows. The first microbatch of a key is recorded; later ones are served from a plan. A key that appears
    with a second number of rows is recorded once more; after that every smaller number is served too. If the promise
    does not hold, requests miss the plan but are still served correctly.
    """

    library: ArenaLibrary
    plan_requests: PlanRequests = _greedy
    num_recorded: int = 0
    num_served: int = 0
    _units: OrderedDict[Hashable, _Unit] = field(default_factory=OrderedDict)
    _recording: tuple[Hashable, int] | None = None

    def begin(self, key: Hashable, num_rows: int, stream: int = 0) -> None:
        """Begin a microbatch that runs on the CUDA stream with this handle."""
        unit = self._units.get(key)
        if unit is None or not unit.covers(num_rows):
            self._recording = key, num_rows
            self.num_recorded += 1
            self.library.begin_log()
            return
        self._units.move_to_end(key)
        if not unit.offsets:
            unit.plan(self.plan_requests)
        self.num_served += self.library.begin(unit.sizes(num_rows), unit.offsets, unit.slab_bytes, stream)

    def end(self) -> None:
        """End the microbatch that ``begin`` began."""
        if self._recording is None:
            self.library.end()
            return
        (key, num_rows), self._recording = self._recording, None
        events = self.library.end_log()
        unit = _Unit(num_rows, requests_from_events(events), len(events))
        old = self._units.pop(key, None)
        if old is not None:
            unit.lines = fit_rows(old.num_rows, old.requests, num_rows, unit.requests)
            if unit.lines is not None and old.num_rows > num_rows:
                old.lines, unit = unit.lines, old
        if unit.requests:
            self._units[key] = unit
        while len(self._units) > _NUM_UNITS:
            self._units.popitem(last=False)

    def describe(self) -> str:
        """One line for the log."""
        stats = self.library.stats()
        return (
            f"static plan: {stats.hit_fraction:.1%} of the requests of {self.num_served:,} planned microbatches at "
            f"their address in a slab of {format_bytes(stats.slab_bytes)} ({stats.num_misses:,} unexpected, "
            f"{stats.num_refused:,} refused, {stats.num_unplanned:,} outlive their microbatch); "
            f"{self.num_recorded:,} microbatches ran without a plan, because their kind was new"
        )


def build_arena() -> ArenaLibrary:
    """Compile and load a new library. Raises ArenaError."""
    with tempfile.TemporaryDirectory(prefix="longhaul-arena-") as folder:
        return ArenaLibrary(Path(folder))  # the loaded library outlives its file


def install_on_cuda(device_index: int) -> AddressArena:
    """Make an arena this process's CUDA allocator, permanently. Call it before anything uses CUDA.

    torch's memory statistics stop working; the arena has its own. Raises ArenaError.
    """
    if torch.cuda.is_initialized():
        raise ArenaError("CUDA is already in use: the allocator must be installed before that")
    with tempfile.TemporaryDirectory(prefix="longhaul-arena-") as folder:
        library = ArenaLibrary(Path(folder))
        allocator = torch.cuda.memory.CUDAPluggableAllocator(
            str(library.path), "longhaul_arena_malloc", "longhaul_arena_free"
        )
    runtime = _cuda_runtime()
    pointers = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in _CUDA_FUNCTIONS]
    library.functions.longhaul_arena_device(*pointers)
    record_stream = ctypes.cast(library.functions.longhaul_arena_record_stream, ctypes.c_void_p).value
    allocator.allocator().set_record_stream_fn(record_stream)
    torch.cuda.memory.change_current_allocator(allocator)
    pool, all_of_it = ctypes.c_void_p(), ctypes.c_uint64(2**64 - 1)
    if runtime.cudaDeviceGetDefaultMemPool(ctypes.byref(pool), ctypes.c_int(device_index)):
        raise ArenaError("this device or driver has no stream-ordered memory pool")
    runtime.cudaMemPoolSetAttribute(pool, ctypes.c_int(_RELEASE_THRESHOLD), ctypes.byref(all_of_it))
    return AddressArena(library)


def replay(requests: SequenceOf[Request], plan: AddressPlan) -> int:
    """Check a plan in one real buffer: fill each block with its own pattern when it is allocated, and compare when it
    is freed. Returns the number of bytes checked; raises PlanError if a block was overwritten."""
    buffer = torch.zeros(plan.peak_bytes, dtype=torch.uint8)
    moments = [(r.start, 1, index) for index, r in enumerate(requests)]
    moments += [(r.stop, 0, index) for index, r in enumerate(requests)]
    num_checked = 0
    for _, is_start, index in sorted(moments):  # at equal times frees come first
        place = buffer[plan.offsets[index] : plan.offsets[index] + requests[index].num_bytes]
        pattern = index % 251 + 1
        if is_start:
            place.fill_(pattern)
        elif not bool((place == pattern).all()):
            raise PlanError(f"request {index} was overwritten at offset {plan.offsets[index]} while it lived")
        else:
            num_checked += len(place)
    return num_checked


def _build(folder: Path) -> Path:
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise ArenaError(f"no C++ compiler is installed (looked for {', '.join(_COMPILERS)})")
    source, library = folder / "arena.cpp", folder / "arena.so"
    source.write_text((resources.files("memory") / "native" / "arena.cpp").read_text(encoding="utf-8"))
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ArenaError(f"{compiler} cannot build the arena: {' '.join(done.stderr.split())[:300]}")
    return library


def _cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError as error:
        raise ArenaError(f"cannot load the CUDA runtime of this torch: {error}") from None
