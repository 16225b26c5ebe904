"""What one decoder layer saves for its backward and how long each of its steps takes, measured on the layer itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from memory.policy import KEEP_ALL
from memory.tape import PAIR, Attention, LayerTape, TokenWise
from memory.tiers import Tier
from parallel import comm
from parallel.program import compile_rank_program
from parallel.rotary import inverse_frequencies, rotary_table
from parallel.sharding import sharded_step
from planner.addresses.swap_fractions import SavedTensor
from planner.plan import AttentionKind, Sharding
from planner.units import MIB
from trainer.prices.calibration import MeasuredShape, design_plan
from trainer.step.runtime import Runtime, bind_attention, run_empty_microbatch

_REPEATS = 3
_LINK_PIECES = 4
_LINK_PIECE_BYTES = 16 * MIB
LINK_TIER_BYTES = _LINK_PIECES * _LINK_PIECE_BYTES
"""Size of the tier in which its speed is measured: large enough that the disk tier flushes the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer with ``num_tokens`` local tokens of one sequence on this rank. ``tensors``: one per token-wise step.
    ``pair_bytes_per_token``: layer input and what attention saves. ``forward_s``: seconds of the layer's forward."""

    tensors: tuple[SavedTensor, ...]
    pair_bytes_per_token: float
    num_tokens: int
    forward_s: float


LOCAL = MeasuredShape(AttentionKind.LOCAL, 1)


def profile_layer(runtime: Runtime, *, num_tokens: int, shape: MeasuredShape = LOCAL) -> LayerProfile:
    """Run the forward of this stage's first layer under a tape, in groups of a shape that uses all ranks. Collective;
    weights and gradients do not change."""
    plan = design_plan(runtime.mesh.data_size, shape, (num_tokens * shape.degree,))
    (microbatch,) = compile_rank_program(plan, runtime.mesh.data_rank).microbatches
    model, device = runtime.model, runtime.mesh.device
    layer = next(iter(model.layers.values()))
    with sharded_step(model, Sharding.GATHER_ONCE, lambda: run_empty_microbatch(runtime)):
        rotary = rotary_table(
            torch.arange(num_tokens, device=device),
            inverse_frequencies(model.spec.head_dim, model.spec.rope_theta), runtime.compute_dtype,
        )
        size = (num_tokens, model.spec.hidden_dim)
        hidden_TD = torch.randn(size, device=device, dtype=runtime.compute_dtype).requires_grad_()
        tape = _TimedTape(LayerTape(KEEP_ALL, None, layer.parameters(), num_tokens), device)
        # not through the module's __call__, which FSDP counts: this forward has no backward
        layer.forward(hidden_TD, rotary, bind_attention(runtime, microbatch), tape)
        tape.tape.finish()
        saved = tape.tape.saved_bytes()
    runtime.optimizer.zero_grad()
    return LayerProfile(
        tensors=tuple(
            SavedTensor(
                name=name, bytes_per_token=saved[name] / num_tokens, recompute_s_per_token=seconds / num_tokens
            )
            for name, seconds in tape.step_s.items()
        ),
        pair_bytes_per_token=saved[PAIR] / num_tokens,
        num_tokens=num_tokens,
        forward_s=sum(tape.step_s.values()) + tape.attention_s,
    )


def measure_link(runtime: Runtime, tier: Tier) -> tuple[float, float]:
    """Bytes per second that this rank stores and loads while all ranks do the same. Collective."""
    data = torch.ones(_LINK_PIECE_BYTES, dtype=torch.uint8, device=runtime.mesh.device)
    best = [float("inf"), float("inf")]
    for _ in range(_REPEATS):
        comm.barrier(runtime.mesh.control_group)
        began_s = time.perf_counter()
        pieces = [tier.store(data) for _ in range(_LINK_PIECES)]
        for piece in pieces:
            piece.transfer.wait()
        _synchronize(runtime.mesh.device)
        stored_s = time.perf_counter()
        for piece in pieces:
            tier.load(piece, data).wait()
        _synchronize(runtime.mesh.device)
        best = [min(best[0], stored_s - began_s), min(best[1], time.perf_counter() - stored_s)]
        for piece in pieces:
            tier.release(piece)
    return LINK_TIER_BYTES / best[0], LINK_TIER_BYTES / best[1]


class _TimedTape:
    """A tape that runs every step several times to measure its seconds."""

    def __init__(self, tape: LayerTape, device: torch.device) -> None:
        self.tape = tape
        self.step_s: dict[str, float] = {}
        self.attention_s = 0.0
        self._device = device

    def step(self, name: str, function: TokenWise, *inputs: torch.Tensor) -> Any:
        with torch.no_grad():
            self.step_s[name] = min(self._time(lambda: function(*inputs)) for _ in range(_REPEATS))
        return self.tape.step(name, function, *inputs)

    def attention(self, function: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        with torch.no_grad():
            self.attention_s = min(self._time(lambda: function(q, k, v)) for _ in range(_REPEATS))
        return self.tape.attention(function, q, k, v)

    def _time(self, work: Callable[[], Any]) -> float:
        _synchronize(self._device)
        began_s = time.perf_counter()
        work()
        _synchronize(self._device)
        return time.perf_counter() - began_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
