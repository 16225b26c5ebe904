"""Records which memory blocks a computation allocates, in what order, and when it frees them.

On CPU, and on the meta device, which computes nothing and so can trace any size, a dispatch mode sees every tensor
storage that an operator returns; the storage's finalizer tells when it is freed. The trace differs from a normal run in
two ways: memory that a kernel allocates and frees inside one operator is not seen; and while a dispatch mode is active,
autograd adds gradients out of place instead of in place, which makes some extra blocks. On CUDA
``requests_from_snapshot`` reads the allocator's own history instead.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.addresses.levels import Section
from planner.addresses.plan import Request, requests_from_events


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationTrace:
    """``requests`` in the order of allocation; ``sections``: named parts of the trace, in order."""

    requests: tuple[Request, ...]
    sections: tuple[Section, ...]


class AllocationRecorder(TorchDispatchMode):
    """Records the storages that operators create while it is active, with their size at creation. Storages that already
    existed, and views of them, are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._live: dict[int, weakref.finalize[Any, Any]] = {}  # by address of the storage object
        self._num_blocks = 0
        self._sections: list[Section] = []
        self._opened: tuple[str, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._live and address not in given:
                self._num_blocks += 1
                self._events.append((self._num_blocks, storage.nbytes()))
                self._live[address] = weakref.finalize(storage, self._free, address, self._num_blocks)
        return result

    def _free(self, address: int, block: int) -> None:
        self._live.pop(address, None)
        self._events.append((block, -1))

    def begin_section(self, name: str) -> None:
        """Begin a section; an open one ends."""
        self.end_section()
        self._opened = name, len(self._events)

    def end_section(self, name: str | None = None) -> None:
        """End the open section, if there is one and it has this name (None: any name)."""
        if self._opened is not None and name in (None, self._opened[0]):
            opened, start = self._opened
            self._sections.append(Section(name=opened, start=start, stop=len(self._events)))
            self._opened = None

    def finish(self) -> AllocationTrace:
        """The trace so far. Blocks freed after this call are not recorded."""
        self.end_section()
        for finalizer in self._live.values():
            finalizer.detach()
        self._live.clear()
        return AllocationTrace(requests=requests_from_events(self._events), sections=tuple(self._sections))


def record_allocations(run: Callable[[], object], layers: Iterable[nn.Module] = ()) -> AllocationTrace:
    """The trace of ``run()``, with a section for the forward and one for the backward of each of ``layers``.

    A layer's first positional argument and its result are tensors; a layer whose input needs no gradient has no
    backward section. Garbage collection is off during the run, because it would free blocks at arbitrary times.
    """
    recorder = AllocationRecorder()
    handles = [handle for number, layer in enumerate(layers) for handle in _mark(recorder, layer, f"layer {number}")]
    try:
        with _no_collector(), recorder:
            run()
        return recorder.finish()
    finally:
        for handle in handles:
            handle.remove()


def requests_from_snapshot(trace: SequenceOf[Mapping[str, Any]]) -> tuple[Request, ...]:
    """Requests from one device's ``torch.cuda.memory._snapshot()["device_traces"][device]``.

    A block can be reused from the event ``free_completed`` on, not from the request to free it.
    """
    events = []
    for entry in trace:
        if entry["action"] == "alloc":
            events.append((int(entry["addr"]), int(entry["size"])))
        elif entry["action"] == "free_completed":
            events.append((int(entry["addr"]), -1))
    return requests_from_events(events)


def _mark(recorder: AllocationRecorder, layer: nn.Module, name: str) -> Iterator[Any]:
    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        recorder.begin_section(f"{name} forward")
        if inputs[0].requires_grad:
            # the previous layer, whose output this is, may have begun its section already
            inputs[0].register_hook(lambda _: recorder.end_section(f"{name} backward"))

    def after(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        recorder.end_section()
        if inputs[0].requires_grad:
            output.register_hook(lambda _: recorder.begin_section(f"{name} backward"))

    yield layer.register_forward_pre_hook(before)
    yield layer.register_forward_hook(after)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _no_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
