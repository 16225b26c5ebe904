"""Activation memory on a CPU-only machine, disk tier: peak resident memory and step time of every way to keep less.

One rank, one local sequence per step, the trainer's own model, attention and memory code. Every (way, length) runs in
a fresh process, ways in turn, the whole round several times: the quickest step counts, and its processor seconds are
there for machines that do other work as well (they leave out waiting for the disk). Compared with plain autograd
(``keep``): ``recompute`` and ``swap`` of this project, torch's full checkpointing of every layer, and torch's
``save_on_cpu`` (a baseline of GPUs: on CPU it has nothing to move).

    python -m benchmarks.memory [--lengths 2048,4096] [--ways keep,checkpoint] [--layers 8] [--rounds 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from planner.plan import AttentionKind
from planner.specs import load_model
from planner.units import MIB, format_bytes

WAYS = ("keep", "recompute", "swap 0", "swap 0.5", "swap 1", "swap measured", "checkpoint", "save_on_cpu")
_VOCABULARY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``dim``: hidden size; heads of 64, MLP of three times that."""

    num_layers: int = 8
    dim: int = 256
    repeats: int = 3
    seed: int = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``peak_bytes``: highest resident set over that of the same process just before the steps."""

    way: str
    length: int
    peak_bytes: int
    step_s: float
    cpu_s: float
    loss: float
    swapped_bytes: int
    note: str = ""


def measure(way: str, length: int, settings: Settings, folder: Path) -> Measured:
    """Build a one-rank runtime and run steps of forward and backward over one sequence of ``length`` tokens."""
    import numpy as np
    import torch
    from torch.utils.checkpoint import checkpoint

    from memory.peak import give_back_freed_memory
    from parallel import comm
    from parallel.program import compile_rank_program
    from trainer.batch import token_rows
    from trainer.build import build_runtime
    from trainer.calibration import MeasuredShape, design_plan
    from trainer.config import DataConfig, MemoryConfig, RunConfig, TrainConfig
    from trainer.rank_env import RankEnv
    from trainer.step import accumulate_gradients

    torch.set_num_threads(1)
    policy, _, fraction = way.partition(" ")
    memory = MemoryConfig(policy=policy if policy in ("keep", "recompute", "swap") else "keep")
    if policy == "swap":
        memory = replace(memory, tier="disk", swap_fraction=None if fraction == "measured" else float(fraction))
    config = TrainConfig(
        run=RunConfig(dir=str(folder), seed=settings.seed, world_size=1, device="cpu"),
        data=DataConfig(max_length=length, tokens_per_step=length), memory=memory,
    )
    heads = settings.dim // 64
    spec = replace(
        load_model("tiny"), num_layers=settings.num_layers, hidden_dim=settings.dim, ffn_dim=3 * settings.dim,
        num_query_heads=heads, num_kv_heads=max(1, heads // 2), head_dim=64, vocab_size=_VOCABULARY,
    )
    env = RankEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
    runtime = build_runtime(config, env, spec, init_method=f"file://{folder / 'store'}")
    if way == "checkpoint":
        for layer in runtime.model.layers.values():
            layer.forward = _Checkpointed(layer.forward, checkpoint)
    alone = MeasuredShape(AttentionKind.LOCAL, 1)
    program = compile_rank_program(design_plan(1, alone, (length,)), 0)
    ids = np.random.default_rng(settings.seed).integers(0, _VOCABULARY, size=length + 1)

    def steps(size: int, repeats: int) -> tuple[float, float, float]:
        part = compile_rank_program(design_plan(1, alone, (size,)), 0) if size != length else program
        wall_s, cpu_s, loss = [], [], 0.0
        for _ in range(repeats):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            hooks = torch.autograd.graph.save_on_cpu() if way == "save_on_cpu" else contextlib.nullcontext()
            with hooks:
                loss, _ = accumulate_gradients(
                    runtime, part, lambda spans: token_rows([ids[: size + 1]], spans, torch.device("cpu")),
                    num_tokens=size,
                )
            wall_s.append(time.perf_counter() - began_s)
            cpu_s.append(time.process_time() - began_cpu_s)
            runtime.optimizer.zero_grad()
        return min(wall_s), min(cpu_s), loss / size

    steps(64, 1)  # what loads once is loaded
    give_back_freed_memory()
    runtime.peak.reset()
    start_bytes = runtime.peak.read_bytes()
    step_s, cpu_s, loss = steps(length, settings.repeats)
    tier = runtime.memory.tier
    result = Measured(
        way=way, length=length, peak_bytes=runtime.peak.read_bytes() - start_bytes,
        step_s=step_s, cpu_s=cpu_s, loss=loss, note=runtime.memory.note,
        swapped_bytes=tier.written_bytes // settings.repeats if tier is not None else 0,
    )
    runtime.memory.close()
    comm.shutdown()
    return result


class _Checkpointed:
    """A layer's forward under torch's own full activation checkpointing."""

    def __init__(self, forward, checkpoint) -> None:  # type: ignore[no-untyped-def]
        self._forward, self._checkpoint = forward, checkpoint

    def __call__(self, *inputs):  # type: ignore[no-untyped-def]
        return self._checkpoint(self._forward, *inputs, use_reentrant=False)


def longest_within(results: SequenceOf[Measured], way: str, cap_bytes: int) -> float:
    """Tokens that fit ``cap_bytes``, from a line through this way's two longest lengths."""
    (low, high) = sorted((r for r in results if r.way == way), key=lambda r: r.length)[-2:]
    slope = (high.peak_bytes - low.peak_bytes) / (high.length - low.length)
    return high.length + (cap_bytes - high.peak_bytes) / slope


def report(results: SequenceOf[Measured], settings: Settings) -> str:
    """A Markdown table. The cap of the last column is what ``keep`` takes at the longest length."""
    longest = max(r.length for r in results)
    keep = {r.length: r for r in results if r.way == "keep"}
    cap = keep[longest].peak_bytes
    lines = [
        f"{settings.num_layers} layers, hidden {settings.dim}, fp32, one rank, one thread, disk tier; quickest of all "
        "steps; highest of all peaks; peaks are over the resident set before the steps",
        "",
        "| way | tokens | peak | of keep | step | over keep | CPU | over keep | swapped | "
        f"tokens within {format_bytes(cap)} (line through two lengths) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in sorted(results, key=lambda r: (WAYS.index(r.way), r.length)):
        base = keep[r.length]
        fits = f"{longest_within(results, r.way, cap):,.0f}" if r.length == longest else ""
        lines.append(
            f"| {r.way} | {r.length:,} | {format_bytes(r.peak_bytes)} | {r.peak_bytes / base.peak_bytes:.2f} | "
            f"{r.step_s:.2f} s | {r.step_s / base.step_s:.2f}x | {r.cpu_s:.2f} s | {r.cpu_s / base.cpu_s:.2f}x | "
            f"{format_bytes(r.swapped_bytes)} | {fits} |"
        )
    notes = sorted({f"{r.length:,} tokens: {r.note}" for r in results if r.way == "swap measured"})
    return "\n".join([*lines, "", *notes]) + "\n"


def _best(several: SequenceOf[Measured]) -> Measured:
    return replace(
        several[0], peak_bytes=max(r.peak_bytes for r in several), step_s=min(r.step_s for r in several),
        cpu_s=min(r.cpu_s for r in several),
    )


def main(arguments: SequenceOf[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096", help="tokens of the sequence, at least two lengths")
    parser.add_argument("--ways", default=",".join(WAYS), help="what to compare; keep is always there")
    parser.add_argument("--layers", type=int, default=Settings().num_layers)
    parser.add_argument("--dim", type=int, default=Settings().dim)
    parser.add_argument("--repeats", type=int, default=Settings().repeats)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", help="file of the report, beside stdout")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = Settings(num_layers=options.layers, dim=options.dim, repeats=options.repeats)
    lengths = sorted({int(word) for word in options.lengths.split(",")})
    ways = ["keep", *(way for way in options.ways.split(",") if way != "keep")]
    if options.worker:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            print(json.dumps(asdict(measure(options.worker, lengths[0], settings, Path(folder)))))
        return 0
    if len(lengths) < 2 or not set(ways) <= set(WAYS):
        parser.error(f"two lengths or more, and ways among: {', '.join(WAYS)}")
    rounds: dict[tuple[int, str], list[Measured]] = {}
    for _ in range(options.rounds):
        for length, way in itertools.product(lengths, ways):
            command = [
                sys.executable, "-m", "benchmarks.memory", "--worker", way, "--lengths", str(length), "--layers",
                str(options.layers), "--dim", str(options.dim), "--repeats", str(options.repeats),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            found = Measured(**json.loads(done.stdout.splitlines()[-1]))
            rounds.setdefault((length, way), []).append(found)
            print(f"{way:<14} {length:>8,} tokens: {found.peak_bytes / MIB:8.1f} MiB {found.step_s:7.2f} s, "
                  f"CPU {found.cpu_s:.2f} s", file=sys.stderr)
    results = [_best(several) for several in rounds.values()]
    losses = [r.loss for r in results if r.length == lengths[-1]]
    if max(losses) - min(losses) > 1e-4:
        print(f"the ways disagree on the loss: {losses}", file=sys.stderr)
        return 1
    text = report(results, settings)
    print(text)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
