"""Times single operations by size, on all ranks at once: attention, linear, all-to-all and point-to-point."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from parallel import comm
from parallel.comm import Message
from parallel.heads import HeadExchange, HeadLayout
from parallel.kernel import Pairs
from planner.cost.fitting import SizeSample
from planner.units import KIB
from trainer.step.runtime import Runtime

_REPEATS = 3
_WIRE_BYTES = (4 * KIB, 64 * KIB, 1024 * KIB)


def measure_operations(runtime: Runtime, *, max_length: int) -> tuple[SizeSample, ...]:
    """A few seconds of measurements. Every rank gets the same samples, which are those of the slowest rank.
    Collective."""
    sizes = tuple(dict.fromkeys(max(16, max_length // share) for share in (32, 8, 2)))
    samples = [_linear(runtime, size) for size in sizes]
    samples += [_attention(runtime, size) for size in sizes]
    num_ranks = runtime.mesh.data_size
    if num_ranks > 1:
        samples += [_point_to_point(runtime, num_bytes) for num_bytes in _WIRE_BYTES]
        samples += [_all_to_all(runtime, num_bytes) for num_bytes in _WIRE_BYTES]
    return tuple(samples)


def _timed(runtime: Runtime, work: Callable[[], object]) -> float:
    """Median seconds of the slowest rank, one warm-up run first."""
    times = []
    for repeat in range(_REPEATS + 1):
        comm.barrier(runtime.mesh.control_group)
        start_s = time.perf_counter()
        work()
        if runtime.mesh.device.type == "cuda":
            torch.cuda.synchronize(runtime.mesh.device)
        elapsed = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64)
        slowest_s = float(comm.all_reduce_max(elapsed, runtime.mesh.control_group))
        if repeat:
            times.append(slowest_s)
    return statistics.median(times)


def _linear(runtime: Runtime, num_tokens: int) -> SizeSample:
    spec, device, dtype = runtime.model.spec, runtime.mesh.device, runtime.compute_dtype
    x = torch.zeros(num_tokens, spec.hidden_dim, device=device, dtype=dtype)
    weight = torch.zeros(2 * spec.ffn_dim, spec.hidden_dim, device=device, dtype=dtype)
    seconds = _timed(runtime, lambda: x @ weight.t())
    return SizeSample(
        op="linear", degree=1, size=num_tokens, work=2.0 * num_tokens * weight.numel(), seconds=seconds
    )


def _attention(runtime: Runtime, num_tokens: int) -> SizeSample:
    spec, device, dtype = runtime.model.spec, runtime.mesh.device, runtime.compute_dtype
    size = runtime.mesh.tensor_size
    q = torch.zeros(num_tokens, spec.num_query_heads // size, spec.head_dim, device=device, dtype=dtype)
    k = torch.zeros(num_tokens, spec.num_kv_heads // size, spec.head_dim, device=device, dtype=dtype)
    pairs = Pairs(True, ((0, num_tokens),), ((0, num_tokens),), device)
    kernel = runtime.engine.kernel

    def work() -> None:
        out, lse = kernel.forward(q, k, k, pairs, 1.0)
        kernel.backward(q, q, k, k, out, lse, pairs, 1.0)

    # forward 2 products, backward 5 (it recomputes the scores), each 2 * (s^2 / 2) * heads * head_dim
    flop = 7.0 * num_tokens**2 * q.shape[1] * q.shape[2]
    return SizeSample(op="attention", degree=1, size=num_tokens, work=flop, seconds=_timed(runtime, work))


def _point_to_point(runtime: Runtime, num_bytes: int) -> SizeSample:
    mesh = runtime.mesh
    ahead, behind = (mesh.data_rank + 1) % mesh.data_size, (mesh.data_rank - 1) % mesh.data_size
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device)
    into = torch.empty_like(out)

    def work() -> None:
        runtime.engine.wire.post([Message(ahead, out)], [Message(behind, into)], "calibration, p2p").wait()

    return SizeSample(op="p2p", degree=mesh.data_size, size=num_bytes, work=num_bytes, seconds=_timed(runtime, work))


def _all_to_all(runtime: Runtime, num_bytes: int) -> SizeSample:
    mesh = runtime.mesh
    degree = mesh.data_size
    rows = max(1, num_bytes // (4 * degree))
    layout = HeadLayout(degree, degree, degree)
    ranks = tuple(range(degree))
    exchange = HeadExchange(layout, ranks, mesh.data_rank, (rows,) * degree, runtime.engine.wire)
    parts = [torch.zeros(rows, 1, 1, device=mesh.device) for _ in ranks]
    seconds = _timed(runtime, lambda: exchange.tokens_from_heads(parts, "calibration, all-to-all"))
    return SizeSample(op="all_to_all", degree=degree, size=num_bytes, work=4.0 * rows * degree, seconds=seconds)
