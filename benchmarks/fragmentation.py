"""Planned addresses compared with torch's caching allocator: reserved memory, fragmentation, share of requests served.

    python -m benchmarks.fragmentation [--model NAME] [--layers N] [--budget TOKENS] [--microbatches K] [--out FILE]

Without CUDA the requests of the trainer's own decoder (bf16, weights and activations kept, one rank) are recorded on
the meta device, where tensors have sizes but no contents, so models can have real sizes. The caching allocator is then
*simulated* (``benchmarks.allocator_model``), without a memory limit and with one of 5 % over the plan. With CUDA the
same microbatches run on the device, each way in a process of its own: torch's allocator, the same with expandable
segments, and the arena.

Microbatches: one of ``--budget`` tokens, repeated (the fixed shape that MEMO plans for), and ``--microbatches`` ragged
ones of log-normal documents. Fragmentation is the share of the reserved bytes that is in no block when the most bytes
are live. Weights are in none of the figures. Gradients are in all of them; each microbatch drops its own at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocator_model import simulate
from benchmarks.lengths import skewed_batches
from memory.alloc_trace import AllocationTrace, record_allocations
from memory.arena import AddressArena, ArenaError, build_arena, install_on_cuda, replay
from memory.policy import KEEP_ALL
from parallel import comm
from parallel.comm import GroupExchange
from parallel.engine import AttentionEngine
from parallel.kernel import AttentionKernel, CudaFlashKernel
from parallel.program import RankMicrobatch, compile_rank_program
from planner.addresses.levels import plan_levels
from planner.addresses.plan import DEFAULT_LIMITS, GREEDY_ONLY, live_bytes, plan_addresses
from planner.inputs.files import load_model
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind
from planner.units import format_bytes
from trainer.model.transformer import Decoder, TensorShard
from trainer.prices.calibration import MeasuredShape, design_plan
from trainer.step.static_plan import microbatch_kind

META = torch.device("meta")
WAYS = ("torch", "torch, expandable segments", "arena")
_SEED = 3
_REPEATS = 3
_RUN_FACTOR = 5
"""Microbatches of the run whose served share is measured, for each ragged one of the first table."""
_RUN_LAYERS = 2


class _AllLabelled(TorchDispatchMode):
    """Makes all tokens carry a loss, because the meta device does not know the labels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty((args[0].numel(), args[0].dim()), dtype=torch.int64, device=META)
        return func(*args, **(kwargs or {}))


class Microbatches:
    """An unsharded decoder that runs forward and backward of any microbatch of whole documents."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, kernel: AttentionKernel | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        with warnings.catch_warnings(), device:
            warnings.simplefilter("ignore")
            self.model = Decoder(spec, TensorShard(0, 1, comm.new_group([0], timeout_s=60))).to(dtype).to(device)
        if device.type != "meta":
            for weight in self.model.parameters():
                torch.nn.init.normal_(weight, std=0.02)
        self._device = device
        wire = GroupExchange(self.model.tensor.group)  # with one rank nothing is ever sent
        self._engine = AttentionEngine(kernel or CudaFlashKernel(), wire, device)

    def program(self, lengths: SequenceOf[int]) -> RankMicrobatch:
        plan = design_plan(1, MeasuredShape(AttentionKind.LOCAL, 1), tuple(lengths))
        (found,) = compile_rank_program(plan, 0).microbatches
        return found

    def run(self, lengths: SequenceOf[int]) -> None:
        """Run forward and backward, and drop the gradients."""
        spec, microbatch = self.model.spec, self.program(lengths)
        tokens_T = torch.zeros(microbatch.num_rows, dtype=torch.int64, device=self._device)
        with _AllLabelled():
            attention = self._engine.bind(
                microbatch, num_query_heads=spec.num_query_heads, num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
            )
            self.model(tokens_T, tokens_T, tokens_T, attention).backward()  # positions and labels do not matter
        for weight in self.model.parameters():
            weight.grad = None

    def trace(self, lengths: SequenceOf[int]) -> AllocationTrace:
        return record_allocations(lambda: self.run(lengths), self.model.layers.values())


@contextmanager
def lone_rank() -> Iterator[None]:
    """A process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            comm.init_process_group(
                device=torch.device("cpu"), rank=0, world_size=1, timeout_s=60, init_method=f"file://{folder}/store"
            )
            yield
        finally:
            comm.shutdown()


def reserved_table(cases: dict[str, list[AllocationTrace]]) -> list[str]:
    """Markdown: memory of each case by way. Ragged microbatches need the slab of the largest plan."""
    lines = [
        "| case | most live | torch (simulated) | fragmentation | device mallocs | with planned + 5% | "
        "expandable (simulated) | fragmentation | planned | fragmentation | bi-level | over one-shot |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, traces in cases.items():
        requests = [trace.requests for trace in traces]
        distinct = {trace.requests: trace for trace in traces}
        torch_own, grown = (simulate(requests, expandable=expandable) for expandable in (False, True))
        most = max(map(live_bytes, requests))
        shot = max(plan_addresses(found, GREEDY_ONLY).peak_bytes for found in distinct)
        levels = max(plan_levels(t.requests, t.sections, GREEDY_ONLY).whole.peak_bytes for t in distinct.values())
        tight = simulate(requests, expandable=False, limit_bytes=1.05 * shot)
        limited = f"{tight.num_retries} retries" if tight.fits else f"out of memory ({tight.num_retries} retries)"
        lines.append(
            f"| {name} | {format_bytes(most)} | {format_bytes(torch_own.reserved_bytes)} | "
            f"{torch_own.fragmentation:.1%} | {torch_own.num_device_mallocs} | {limited} | "
            f"{format_bytes(grown.reserved_bytes)} | "
            f"{grown.fragmentation:.1%} | {format_bytes(shot)} | {1 - most / shot:.1%} | {format_bytes(levels)} | "
            f"{levels / shot - 1:+.1%} |"
        )
    return lines


def planning_table(trace: AllocationTrace, what: str, *, with_solvers: bool) -> list[str]:
    """Markdown: peak, gap and wall time of each planner of addresses."""
    lines = [
        f"Planning {what}: {len(trace.requests):,} requests, {len(trace.sections)} sections", "",
        "| plan | peak | over the bound | who found it | seconds |", "|---|--:|--:|---|--:|",
    ]
    no_solver = dataclasses.replace(DEFAULT_LIMITS, max_mip_pairs=0, uses_packing=False)
    ways = [("greedy", GREEDY_ONLY), ("with local search", no_solver), ("all", DEFAULT_LIMITS)]
    for name, limits in ways if with_solvers else ways[:2]:
        began_s = time.perf_counter()
        plan = plan_addresses(trace.requests, limits)
        spent_s = time.perf_counter() - began_s
        lines.append(
            f"| one shot, {name} | {format_bytes(plan.peak_bytes)} | {plan.relative_gap:.2%} | {plan.method} | "
            f"{spent_s:.1f} |"
        )
        began_s = time.perf_counter()
        levels = plan_levels(trace.requests, trace.sections, limits)
        spent_s = time.perf_counter() - began_s
        inner = ", ".join(f"{plan.method} {plan.relative_gap:.1%}" for plan in levels.inner)
        lines.append(
            f"| bi-level, {name} | {format_bytes(levels.whole.peak_bytes)} | {levels.whole.relative_gap:.2%} | "
            f"{levels.whole.method} over {levels.num_outer_requests}; level 1: {inner} | {spent_s:.1f} |"
        )
    return lines


def served_lines(microbatches: Microbatches, lengths: SequenceOf[tuple[int, ...]]) -> list[str]:
    """Run ragged microbatches through the real arena, on addresses without memory, and report what it served."""
    try:
        library = build_arena()
    except ArenaError as error:
        return [f"Share of requests served: not measured, {error}"]
    keep_alive = _use_numbers_for_memory(library)
    arena, functions = AddressArena(library), library.functions
    num_requests, done_once, hits = 0, None, 0
    for number, some in enumerate(lengths):
        requests = microbatches.trace(some).requests
        microbatch = microbatches.program(some)
        kind = microbatch_kind(
            microbatch, KEEP_ALL, is_first=False, loss_chunk_tokens=microbatches.model.loss_chunk_tokens, is_whole=True
        )
        if number == len(lengths) // 2:
            done_once, hits = num_requests, library.stats().num_hits
        arena.begin(kind, microbatch.num_rows)
        moments = [(r.start, 1, i) for i, r in enumerate(requests)] + [(r.stop, 0, i) for i, r in enumerate(requests)]
        pointers = {}
        for _, is_start, index in sorted(moments):
            size = requests[index].num_bytes
            if is_start:
                pointers[index] = functions.longhaul_arena_malloc(size, 0, 0)
            else:
                functions.longhaul_arena_free(pointers.pop(index), size, 0, 0)
        arena.end()
        num_requests += sum(request.num_bytes > 0 for request in requests)
    del keep_alive
    assert done_once is not None
    stats = library.stats()
    rows = sorted(sum(some) for some in lengths)
    return [
        f"Served from plans over {len(lengths)} ragged microbatches of {rows[0]:,} to {rows[-1]:,} rows "
        f"({_RUN_LAYERS} layers): {stats.num_hits / num_requests:.1%} of all requests, "
        f"{(stats.num_hits - hits) / (num_requests - done_once):.1%} in the second half; {arena.num_recorded} "
        "microbatches were of a new kind or larger than any of theirs. Of the requests of planned microbatches "
        f"{stats.num_misses + stats.num_refused} were not as planned and {stats.num_unplanned} had no place.",
    ]


def _use_numbers_for_memory(library) -> object:  # type: ignore[no-untyped-def]
    """Make the arena's device functions hand out addresses without memory. The caller must keep the returned value
    alive while they are used."""
    handle, integer = ctypes.c_void_p, ctypes.c_int
    top = [2**40]

    def device_malloc(out, size, _stream):  # type: ignore[no-untyped-def]
        out[0] = top[0]
        top[0] += -(-size // 512) * 512 + 512
        return 0

    malloc = ctypes.CFUNCTYPE(integer, ctypes.POINTER(handle), ctypes.c_size_t, handle)(device_malloc)
    free = ctypes.CFUNCTYPE(integer, handle, handle)(lambda _pointer, _stream: 0)
    pointers = [ctypes.cast(function, handle) for function in (malloc, free)]
    library.functions.longhaul_arena_device(*pointers, None, None, None, None)
    return malloc, free


def on_cuda(way: str, spec: ModelSpec, lengths: SequenceOf[tuple[int, ...]]) -> dict[str, float]:
    """Run the microbatches on this process's device several times; the last round is timed."""
    arena = install_on_cuda(0) if way == "arena" else None
    device = torch.device("cuda", 0)
    with lone_rank():
        microbatches = Microbatches(spec, device)
        weights = sum(weight.numel() * weight.element_size() for weight in microbatches.model.parameters())
        for round_number in range(_REPEATS):
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            for number, some in enumerate(lengths):
                if arena is not None:
                    arena.begin(number, sum(some), torch.cuda.current_stream().cuda_stream)
                microbatches.run(some)
                if arena is not None:
                    arena.end()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began_s
            del round_number
        if arena is not None:
            stats = arena.library.stats()
            return {"seconds": seconds, "reserved": stats.slab_bytes, "allocated": stats.peak_bytes - weights,
                    "retries": stats.num_failures, "hits": stats.hit_fraction}
        counted = torch.cuda.memory_stats()
        return {"seconds": seconds, "reserved": counted["reserved_bytes.all.peak"] - weights,
                "allocated": counted["allocated_bytes.all.peak"] - weights, "retries": counted["num_alloc_retries"],
                "hits": 0.0}


def cuda_table(arguments: SequenceOf[str]) -> list[str]:
    lines = ["| way | reserved | most allocated | fragmentation | retries | seconds | at planned addresses |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for way in WAYS:
        environment = dict(os.environ)
        if "expandable" in way:
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        command = [sys.executable, "-m", "benchmarks.fragmentation", *arguments, "--way", way]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        found = json.loads(answer.splitlines()[-1])
        lines.append(
            f"| {way} | {format_bytes(found['reserved'])} | {format_bytes(found['allocated'])} | "
            f"{1 - found['allocated'] / found['reserved']:.1%} | {found['retries']:.0f} | {found['seconds']:.2f} | "
            f"{found['hits']:.1%} |"
        )
    return lines


def simulated_report(options: argparse.Namespace, spec: ModelSpec, ragged: SequenceOf[tuple[int, ...]]) -> list[str]:
    with lone_rank():
        microbatches = Microbatches(spec, META)
        fixed = microbatches.trace((options.budget,))
        cases = {
            f"{options.budget:,} tokens, {_REPEATS} times": [fixed] * _REPEATS,
            f"{len(ragged)} ragged, up to {options.budget:,}": [microbatches.trace(some) for some in ragged],
        }
        lines = [*reserved_table(cases), ""]
        few = dataclasses.replace(spec, num_layers=_RUN_LAYERS)
        small = Microbatches(few, META)
        whole = small.trace((options.budget,))
        lines += [*planning_table(whole, f"{_RUN_LAYERS} layers", with_solvers=options.long), ""]
        tiny = Microbatches(dataclasses.replace(load_model("tiny"), vocab_size=512), META)
        trace = tiny.trace((1000,))
        plans = (plan_addresses(trace.requests), plan_levels(trace.requests, trace.sections).whole)
        checked = sum(replay(trace.requests, plan) for plan in plans)
        lines += [f"Replayed in real memory, one-shot and bi-level: {format_bytes(checked)} written, read back and "
                  "found intact (model tiny, 1,000 tokens).", ""]
        most = options.budget // 2
        run = skewed_batches(
            num_batches=_RUN_FACTOR * options.microbatches, tokens_per_batch=most, max_length=most, seed=_SEED + 1
        )
        return lines + served_lines(small, run)


def main(arguments: SequenceOf[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fragmentation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="llama-3-8b", help="a built-in model or a YAML file")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--budget", type=int, default=32768, help="most tokens of a microbatch")
    parser.add_argument("--microbatches", type=int, default=12)
    parser.add_argument("--long", action="store_true", help="plan with solvers as well (minutes)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one measurement
    options = parser.parse_args(arguments)
    spec = dataclasses.replace(load_model(options.model), num_layers=options.layers)
    ragged = skewed_batches(
        num_batches=options.microbatches, tokens_per_batch=options.budget, max_length=options.budget, seed=_SEED
    )
    if options.way is not None:
        print(json.dumps(on_cuda(options.way, spec, ragged)))
        return
    began_s = time.perf_counter()
    is_real = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if is_real else f"{platform.machine()} CPU, simulated allocator, no CUDA"
    lines = [f"{spec.name} with {spec.num_layers} layers, bf16, {where}, torch {torch.__version__}", ""]
    lines += cuda_table(arguments) if is_real else simulated_report(options, spec, ragged)
    lines += ["", f"{time.perf_counter() - began_s:.0f} s in all"]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
