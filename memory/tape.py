"""Records one layer's forward step by step, so that its backward can be given each saved tensor again.

The layer calls ``step(name, function, *inputs)`` for all token-wise work and ``attention`` for the rest. One ordinary
forward builds the autograd graph; saved-tensor hooks replace what the graph holds by views of blocks. Before the
backward uses a view, its block is restored: swapped rows from the tier, kept rows, and the remaining rows by running
the step again on just these rows. Recompute therefore runs only what is needed (never the last matrix product of the
MLP, never attention), and gradients come from the same kernel calls over the same rows as without swap or recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks

from memory.blocks import Block, View, row_base, whole_base
from memory.policy import ActivationPolicy
from memory.tiers import Tier, Transfer
from memory.timeline import Timeline
from planner.errors import LonghaulError
from planner.measured.copy_times import LAYERS

PAIR = "pair"
"""Name for the bytes of the layer input and attention's saved tensors in ``saved_bytes``."""
TokenWise = Callable[..., Any]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Returns None if only keys and values were wanted; the layer then ends there."""


class TapeError(LonghaulError):
    """A layer broke the tape's rules: a step is not token-wise, or there is a second backward."""


class Tape(Protocol):
    """The calls that a decoder layer makes."""

    def step(self, name: str, function: TokenWise, *inputs: torch.Tensor) -> Any:
        """``function(*inputs)``: a tensor or a tuple of tensors. Every input and output has one row per token, and rows
        are computed independently. Parameters are not inputs; the function holds them."""

    def attention(self, function: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """``function(q, k, v)``, which may mix rows and communicate with other ranks."""


class PlainTape:
    """Keeps everything: ordinary autograd."""

    def step(self, name: str, function: TokenWise, *inputs: torch.Tensor) -> Any:
        return function(*inputs)

    def attention(self, function: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        return function(q, k, v)


@dataclass(slots=True)
class _Step:
    """``inputs``: views of blocks, or constants (tensors without gradient). ``packed``: blocks that this step created
    for saved tensors, by the running number of the save; ``outputs``: blocks behind its outputs, by position."""

    name: str
    function: TokenWise
    inputs: tuple[View | torch.Tensor, ...]
    packed: dict[int, Block] = field(default_factory=dict)
    outputs: dict[int, Block] = field(default_factory=dict)

    def blocks(self) -> list[Block]:
        return list({id(block): block for block in (*self.packed.values(), *self.outputs.values())}.values())


class LayerTape:
    """A tape that swaps, keeps or drops saved tensors. ``constants``: tensors that are saved but left alone (the
    parameters). They are read when the first step runs, because ``zero3`` gathers them when the layer begins. Allows
    one forward and one backward."""

    def __init__(
        self, policy: ActivationPolicy, tier: Tier | None, constants: Iterable[torch.Tensor], num_rows: int,
        timeline: Timeline | None = None,
    ) -> None:
        self._policy = policy
        self._tier = tier
        self._num_rows = num_rows
        self._timeline = timeline
        self._parameters: Iterable[torch.Tensor] = constants
        self._constants: set[int] = set()
        self._blocks: dict[int, Block] = {}  # by address of the storage, during the forward only
        self._pair: list[Block] = []
        self._steps: list[_Step] = []
        self._maker: dict[int, _Step] = {}  # by id of the block
        self.recomputed_rows = 0
        self.unsplit_bytes = 0
        """Bytes that token-wise steps saved in a form that cannot be split by rows; they are kept."""

    # ---- forward

    def step(self, name: str, function: TokenWise, *inputs: torch.Tensor) -> Any:
        if not self._steps:
            self._constants.update(tensor.untyped_storage().data_ptr() for tensor in self._parameters)
        step = _Step(name, function, tuple(self._input(tensor) for tensor in inputs))
        self._steps.append(step)
        num_packed = 0

        def pack(tensor: torch.Tensor) -> View | torch.Tensor:
            nonlocal num_packed
            number, num_packed = num_packed, num_packed + 1
            address = tensor.untyped_storage().data_ptr()
            if address in self._constants:
                return tensor
            if address not in self._blocks:
                base = row_base(tensor, self._num_rows)
                if base is None:
                    self.unsplit_bytes += tensor.untyped_storage().nbytes()
                    return tensor.detach()
                self._blocks[address] = step.packed[number] = Block(base)
            return self._view(tensor, address)

        with saved_tensors_hooks(pack, self._unpack):
            outputs = function(*inputs)
        for place, tensor in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            address = tensor.untyped_storage().data_ptr()
            base = row_base(tensor, self._num_rows) if address not in self._blocks else None
            if base is not None:
                self._blocks[address] = step.outputs[place] = Block(base)
        return outputs

    def attention(self, function: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        def pack(tensor: torch.Tensor) -> View:
            address = tensor.untyped_storage().data_ptr()
            if address not in self._blocks:
                self._add_pair(tensor)
            return self._view(tensor, address)

        with saved_tensors_hooks(pack, self._unpack):
            return function(q, k, v)

    def finish(self) -> tuple[tuple[Transfer, torch.Tensor], ...]:
        """End the forward and apply the policy to all blocks. Returns copies in flight with the memory they read."""
        for step in self._steps:
            for block in step.blocks():
                self._maker[id(block)] = step
        for step in reversed(self._steps):  # a step that runs again needs its inputs once more
            if self._split(step)[0] + self._split(step)[1] < self._num_rows and any(b.num_uses for b in step.blocks()):
                for view in step.inputs:
                    if isinstance(view, View):
                        view.block.num_uses += 1
        transfers = []
        for block, rows in (
            *((block, self._policy.split_pair(block.num_rows)) for block in self._pair),
            *((block, self._split(step)) for step in self._steps for block in step.blocks()),
        ):
            base = block.base
            if not block.num_uses:
                block.drop()
            elif base is not None and (transfer := block.put_away(*rows, self._tier)) is not None:
                transfers.append((transfer, base))
        self._blocks.clear()
        return tuple(transfers)

    def saved_bytes(self) -> dict[str, int]:
        """Bytes that the backward needs, by the step that made them; PAIR for layer input and attention."""
        found = {PAIR: sum(block.num_bytes for block in self._pair if block.num_uses)}
        for step in self._steps:
            num_bytes = sum(block.num_bytes for block in step.blocks() if block.num_uses)
            found[step.name] = found.get(step.name, 0) + num_bytes
        return found

    def _split(self, step: _Step) -> tuple[int, int]:
        return self._policy.split(step.name, self._num_rows)

    def _input(self, tensor: torch.Tensor) -> View | torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if not tensor.requires_grad:
            self._constants.add(address)
            return tensor
        if address not in self._blocks:
            self._add_pair(tensor)
        return View.of(tensor, self._blocks[address])

    def _add_pair(self, tensor: torch.Tensor) -> None:
        block = Block(whole_base(tensor).view(-1, 1))  # never recomputed, so split by elements
        self._blocks[tensor.untyped_storage().data_ptr()] = block
        self._pair.append(block)

    def _view(self, tensor: torch.Tensor, address: int) -> View:
        block = self._blocks[address]
        block.num_uses += 1
        return View.of(tensor, block)

    # ---- backward

    def start_loads(self) -> None:
        """Prefetch: start loading everything that was swapped."""
        for block in (*self._pair, *(block for step in self._steps for block in step.blocks())):
            block.start_load(self._tier)

    def _unpack(self, saved: View | torch.Tensor) -> torch.Tensor:
        return self._take(saved) if isinstance(saved, View) else saved

    def _take(self, view: View) -> torch.Tensor:
        """The view's tensor; its block is freed after the last use."""
        block = view.block
        if not block.num_uses:
            raise TapeError("a saved activation is asked for again: swap and recompute allow only one backward")
        block.finish_load(self._tier)
        step = self._maker.get(id(block))
        if step is not None and block.num_held < block.num_rows:
            self._run_again(step)
        assert block.base is not None
        tensor = view.on(block.base)
        block.num_uses -= 1
        if not block.num_uses:
            block.drop()
        return tensor

    def _run_again(self, step: _Step) -> None:
        """Recompute the rows that the step's blocks do not hold."""
        num_held = sum(self._split(step))
        num_rows = self._num_rows - num_held
        inputs = []
        for given in step.inputs:
            tensor = self._take(given) if isinstance(given, View) else given
            inputs.append(tensor[num_held:].detach().requires_grad_(isinstance(given, View)))
        packed: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> None:
            packed.append(tensor.detach())

        start = None if self._timeline is None else self._timeline.stamp()
        with torch.enable_grad(), saved_tensors_hooks(keep, _never):
            outputs = step.function(*inputs)
        if self._timeline is not None:
            self._timeline.add(LAYERS, f"recompute {step.name}", start)
        made = outputs if isinstance(outputs, tuple) else (outputs,)
        self.recomputed_rows += num_rows
        for source, blocks in ((packed, step.packed), (made, step.outputs)):
            for place, block in blocks.items():
                if not block.num_uses:
                    continue
                rows = row_base(source[place].detach(), num_rows) if place < len(source) else None
                if rows is None or rows.shape[1] != block.shape[1]:
                    raise TapeError(f"step {step.name}: returns other tensors for {num_rows} of its rows than for all")
                block.finish_load(self._tier)
                block.fill(rows)


def _never(saved: None) -> torch.Tensor:
    raise TapeError("the graph of a recomputation is not meant to be used")
