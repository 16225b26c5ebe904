"""K/V and dK/dV of earlier chunks in a tier: the memory it saves, the time it costs, the longest sequence it allows.

    python -m benchmarks.chunked_tier --part sizes     SeCO with and without the tier at several chunk sizes
    python -m benchmarks.chunked_tier --part longest   longest sequence of every way under one limit (RLIMIT_DATA)

``sizes``: every chunk reads the K/V of all earlier chunks twice and adds to their dK/dV once. So copies grow with
tokens times chunks while computation grows with tokens squared, and the table shows from which chunk size on copies
hide. Next to each peak (over what the process holds before the step) is its ideal: gathered weights and their
gradients, two layers' K/V, three layers' dK/dV and the activations of one chunk; with the host tier on CPU also all K/V
and dK/dV, because the tier is in the same memory. Ways take turns. Seconds are medians, and ratios are medians of the
turns' ratios.

``longest``: the limit, enforced by the system, is ``--budget-mib`` over what a process has after a first small step.
The longest sequence of each way is found by doubling and bisection, with each step in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory_run import Bench, Measured, MemoryWorkload, bench, data_bytes, measure
from memory.chunked_tier import NUM_DKV_BUFFERS, NUM_KV_BUFFERS
from memory.peak import give_back_freed_memory
from memory.tiers import HOST
from planner.measured.copy_times import copy_seconds
from planner.units import MIB, format_bytes, format_seconds
from trainer.model.optimizer import local_shard
from trainer.step.chunks import layer_row_bytes

SIZES = ("seco", "seco disk")
LONGEST = ("recompute", "swap 0", "seco", "seco disk")
_WARM_UP_CHUNKS = 3
_MOST_OVER = 0.1
_FINENESS = 16
"""The longest sequence is found to within this fraction (1/16) of its length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStep:
    """One step of one way. ``moved_bytes``: written to the tier and read from it. ``hidden_share``: share of the
    copies' seconds in which the computing thread did not wait for a copy."""

    seconds: float
    cpu_s: float
    peak_bytes: int
    ideal_bytes: int
    moved_bytes: int = 0
    hidden_share: float = 1.0


def measure_step(way: str, length: int, workload: MemoryWorkload) -> TierStep:
    """Measure one step over a sequence of ``length`` tokens, after a short one."""
    with bench(way, length, workload) as made:
        made.step(min(length, _WARM_UP_CHUNKS * workload.chunk_tokens))
        memory, tier = made.runtime.memory, made.runtime.memory.tier
        moved_bytes = 0 if tier is None else -tier.written_bytes - tier.read_bytes
        memory.record(True)
        give_back_freed_memory()
        made.runtime.peak.reset()
        start_bytes = made.runtime.peak.read_bytes()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        made.step(length)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        peak_bytes = made.runtime.peak.read_bytes() - start_bytes
        if tier is not None:
            moved_bytes += tier.written_bytes + tier.read_bytes
        copy_s, hidden_s = copy_seconds(memory.timeline.read())
        return TierStep(
            seconds=wall_s, cpu_s=cpu_s, peak_bytes=peak_bytes, ideal_bytes=_ideal_bytes(made, length),
            moved_bytes=moved_bytes, hidden_share=hidden_s / copy_s if copy_s else 1.0,
        )


def _ideal_bytes(made: Bench, length: int) -> int:
    """Bytes that a step of ``length`` tokens should add to the process."""
    runtime, chunk_tokens = made.runtime, made.workload.chunk_tokens
    num_layers, kv_bytes, dkv_bytes = layer_row_bytes(runtime)
    rows = (length - 1) // chunk_tokens * chunk_tokens  # without the last chunk, whose K/V no other chunk reads
    tier = runtime.memory.tier
    stored_bytes = num_layers * (kv_bytes + dkv_bytes) * rows
    buffer_bytes = rows * (min(NUM_KV_BUFFERS, num_layers) * kv_bytes + min(NUM_DKV_BUFFERS, num_layers) * dkv_bytes)
    kept_bytes = stored_bytes if tier is None else buffer_bytes
    if tier is not None and tier.name == HOST:
        kept_bytes += stored_bytes
    weight_bytes = sum(local_shard(each).nbytes for each in runtime.model.parameters())
    return int(2 * weight_bytes + kept_bytes + chunk_tokens * num_layers * runtime.model.spec.saved_bytes_per_token(4))


def sizes_table(found: dict[int, list[dict[str, TierStep]]]) -> tuple[list[str], bool]:
    """Markdown, and whether the goal is met. ``found``: the turns by chunk size; each turn has all ways."""
    lines = [
        "| chunk | way | seconds | over seco | CPU over seco | peak over start | should be | moved | copies hidden |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    worst = 0.0
    for chunk_tokens, turns in found.items():
        for way in turns[0]:
            steps = [turn[way] for turn in turns]
            peak_bytes, ideal_bytes = max(each.peak_bytes for each in steps), steps[0].ideal_bytes
            worst = max(worst, peak_bytes / ideal_bytes - 1)
            over, cpu_over = (
                statistics.median(getattr(turn[way], name) / getattr(turn["seco"], name) for turn in turns)
                for name in ("seconds", "cpu_s")
            )
            hidden = statistics.median(each.hidden_share for each in steps)
            moved = (f"{format_bytes(steps[0].moved_bytes)} | {hidden:.0%}" if steps[0].moved_bytes else "|")
            lines.append(
                f"| {chunk_tokens:,} | {way} | {format_seconds(statistics.median(each.seconds for each in steps))} | "
                f"{over:.2f} | {cpu_over:.2f} | {format_bytes(peak_bytes)} | {format_bytes(ideal_bytes)} | {moved} |"
            )
    met = worst <= _MOST_OVER
    verdict = f"goal {'met' if met else 'NOT met'}: peaks at most {_MOST_OVER:.0%} over what they should be"
    return [*lines, "", f"{verdict} (here {worst:+.1%})"], met


def part_sizes(options: argparse.Namespace) -> tuple[list[str], bool]:
    """Measure every way at every chunk size."""
    ways = SIZES if options.ways is None else options.ways.split(",")
    found: dict[int, list[dict[str, TierStep]]] = {}
    for chunk_tokens in map(int, options.chunk_tokens.split(",")):
        for _ in range(options.repeats):
            turn = {}
            for way in ways:
                turn[way] = TierStep(**_worker(options, chunk_tokens, job="step", way=way, length=options.tokens))
                print(f"{chunk_tokens:>6} {way:<10} {turn[way].seconds:7.2f} s", file=sys.stderr)
            found.setdefault(chunk_tokens, []).append(turn)
    return sizes_table(found)


def longest_fit(fits: Callable[[int], Measured], start: int, most: int) -> Measured | None:
    """The longest sequence of at most ``most`` tokens that fits, to within 1/16 of its length. None where ``start``
    tokens do not fit."""
    low, high = None, start
    while high <= most:
        found = fits(high)
        if not found.fits:
            break
        low, high = found, min(2 * high, most) if high < most else most + 1
    while low is not None and high <= most and high - low.length > max(1, low.length // _FINENESS):
        found = fits((low.length + high) // 2)
        if found.fits:
            low = found
        else:
            high = found.length
    return low


def longest_table(found: dict[str, Measured | None], most: int) -> list[str]:
    """Markdown: the longest sequence of each way."""
    lines = ["| way | longest | of recompute's | seconds | seconds a 1,000 tokens |", "|---|--:|--:|--:|--:|"]
    base = found.get("recompute")
    for way, each in found.items():
        if each is None:
            lines.append(f"| {way} | none | | | |")
            continue
        more = "at least " if each.length >= most else ""
        ratio = f"{each.length / base.length:.1f}" if base is not None else ""
        lines.append(
            f"| {way} | {more}{each.length:,} | {ratio} | {format_seconds(each.step_s)} | "
            f"{1000 * each.step_s / each.length:.2f} |"
        )
    return lines


def part_longest(options: argparse.Namespace) -> tuple[list[str], bool]:
    """Find the longest sequence of each way under one limit."""
    (chunk_tokens,) = map(int, options.chunk_tokens.split(","))
    budget_bytes = int(options.budget_mib * MIB)
    limit_bytes = budget_bytes + _worker(options, chunk_tokens, job="start", way="keep", length=options.start)
    found = {}
    for way in LONGEST if options.ways is None else options.ways.split(","):

        def fits(length: int, way: str = way) -> Measured:
            answer = _worker(options, chunk_tokens, job="fit", way=way, length=length, limit_bytes=limit_bytes)
            each = Measured(**answer)
            print(f"{way:<10} {length:>7,} {f'{each.step_s:.2f} s' if each.fits else 'does not fit'}", file=sys.stderr)
            return each

        found[way] = longest_fit(fits, options.start, options.tokens)
    lines = [
        f"RLIMIT_DATA {format_bytes(limit_bytes)}: {format_bytes(budget_bytes)} over what a process has after a first "
        f"small step; chunks of {chunk_tokens:,} tokens", "", *longest_table(found, options.tokens),
    ]
    return lines, all(each is not None for each in found.values())


PARTS = {"sizes": part_sizes, "longest": part_longest}
_SHAPES = {"sizes": (16, 128, 8192, "256,512,1024,2048"), "longest": (32, 128, 32768, "256")}
"""Layers, hidden size, tokens (of ``longest``: at most) and chunk sizes of each part."""


def _worker(options: argparse.Namespace, chunk_tokens: int, **told: Any) -> Any:
    """Take one measurement in a process of its own and return its answer."""
    workload = MemoryWorkload(num_layers=options.layers, dim=options.dim, repeats=1, chunk_tokens=chunk_tokens)
    told["workload"] = asdict(workload)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chunked_tier", "--worker", json.dumps(told)],
        capture_output=True, text=True, check=False,
        # the environment that ``longhaul train`` sets on Linux (launch.environment)
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{told} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(told: dict[str, Any]) -> Any:
    way, length, workload = told["way"], told["length"], MemoryWorkload(**told["workload"])
    if told["job"] == "step":
        return asdict(measure_step(way, length, workload))
    if told["job"] == "fit":
        return asdict(measure(way, length, workload, limit_bytes=told["limit_bytes"]))
    with bench(way, length, workload) as made:
        made.step(length)
        return data_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="sizes")
    parser.add_argument("--tokens", type=int, help="of the sequence; of longest: at most")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int, help="hidden size, a multiple of 64")
    parser.add_argument("--chunk-tokens", help="comma-separated; of longest one")
    parser.add_argument("--ways", help="comma-separated: seco (needed by sizes), seco disk, seco host; of longest also "
                        "recompute, swap 0, ...")
    parser.add_argument("--repeats", type=int, default=2, help="of sizes: turns")
    parser.add_argument("--budget-mib", type=float, default=128, help="of longest")
    parser.add_argument("--start", type=int, default=64, help="of longest: the first length that is tried")
    parser.add_argument("--out", type=Path, help="file of the report")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(_work(json.loads(options.worker))))
        return 0
    layers, dim, tokens, chunks = _SHAPES[options.part]
    options.layers, options.dim = options.layers or layers, options.dim or dim
    options.tokens, options.chunk_tokens = options.tokens or tokens, options.chunk_tokens or chunks
    lines, met = PARTS[options.part](options)
    head = (f"`--part {options.part}`: {options.layers} layers, hidden {options.dim}, "
            f"{'at most ' if options.part == 'longest' else ''}{options.tokens:,} tokens, fp32, one rank, one thread")
    text = "\n".join([head, "", *lines]) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
