"""Chunked training compared with whole microbatches and checkpointing: peak memory, time, and the noise of sampling.

    python -m benchmarks.chunked [--tokens N] [--chunks K] [--layers N] [--hidden N] [--repeats N] [--out FILE]

One rank trains one document of ``--tokens`` tokens, each way in a process of its own: all activations kept, every layer
recomputed (``torch.utils.checkpoint``), SeCO in ``--chunks`` chunks, SpaCO with every eighth chunk, and SeCO with the
last eighth of the chunks kept. All ways take turns, ``--repeats`` times. Seconds are medians, and a ratio of two ways
is the median of the turns' ratios, so that other load on the machine affects both.

Peaks are over what the process holds just before the step (its shard of the weights, libraries, and what the first
small step loads). On CPU they are resident memory, which is never exact to the byte. Next to each chunked peak is its
ideal: gathered weights and gradients, K/V and dK/dV (fp32), and the saved activations of one chunk (or of the tokens
that are kept). The second table enumerates all samples of a small case: the distance of each sampling's mean gradient
from the exact gradient, and the standard deviation, both relative to the exact gradient's norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from memory.chunked import Chunk, ChunkSchedule, cut_chunks, place_rows, schedule_chunks
from memory.chunked_loss import IGNORE
from memory.peak import give_back_freed_memory, map_large_blocks
from memory.sparse_chunks import EXACT, ChunkSampler, ChunkWeight, Sampling, moments
from parallel import comm
from parallel.program import RankProgram, compile_rank_program
from planner.inputs.model import ModelSpec
from planner.plan import AttentionGroup, AttentionKind, Microbatch, SolveReport, SolveStatus, Span, StepPlan
from planner.plan import Sequence as Document
from planner.units import format_bytes, format_seconds
from trainer.build import build_runtime
from trainer.data.batch import TokenRows, token_rows
from trainer.model.optimizer import local_shard
from trainer.rank_env import RankEnv
from trainer.settings.tree import RunConfig, TrainConfig
from trainer.step.chunk_policy import ChunkPolicy
from trainer.step.one_step import accumulate_gradients
from trainer.step.runtime import Runtime

WAYS = ("whole", "checkpoint", "seco", "spaco 1/8", "seco, 1/8 kept")
_SHARE = 8
_WARM_UP_CHUNKS = 3
_MOST_OVER = 0.1
_LEAST_RATE = 2.5
_SPREAD_CHUNKS = 6
"""Chunks of the small case; the first half carries no loss, like a prompt."""
_SPREAD_CHUNK_TOKENS = 16
_SPREAD_FRACTION = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The document and the model. ``num_chunks`` divides ``num_tokens``."""

    num_tokens: int
    num_chunks: int
    num_layers: int
    hidden_dim: int

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="benchmark", num_layers=self.num_layers, hidden_dim=self.hidden_dim, ffn_dim=self.hidden_dim * 8 // 3,
            num_query_heads=self.hidden_dim // 32, num_kv_heads=max(1, self.hidden_dim // 128), head_dim=32,
            vocab_size=256,
        )

    @property
    def chunk_tokens(self) -> int:
        return self.num_tokens // self.num_chunks

    def policy(self, way: str) -> ChunkPolicy | None:
        """How ``way`` runs in chunks; None where it runs whole microbatches."""
        keep_rows = self.num_tokens // _SHARE if way.endswith("kept") else 0
        sampler = ChunkSampler(kind=Sampling.EVEN, fraction=1 / _SHARE, seed=0) if way.startswith("spaco") else None
        if not way.startswith(("seco", "spaco")):
            return None
        return ChunkPolicy(chunk_tokens=self.chunk_tokens, keep_rows=keep_rows, sampler=sampler)

    def stored_bytes(self, way: str) -> int:
        """Bytes of stored K/V and dK/dV in fp32."""
        _, num_rows, num_carried = place_rows(*self._scheduled(way), member=None)
        spec = self.spec
        return (num_rows + num_carried) * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 4

    def kept_tokens(self, way: str) -> int:
        """Tokens whose activations exist at the same time."""
        chunks, schedule = self._scheduled(way)
        return sum(chunks[index].num_tokens for index in schedule.kept)

    def _scheduled(self, way: str) -> tuple[tuple[Chunk, ...], ChunkSchedule]:
        policy = self.policy(way)
        assert policy is not None, "trains whole microbatches"
        chunks = cut_chunks([Span(0, 0, self.num_tokens)], degree=1, chunk_tokens=self.chunk_tokens)
        selected = [True] * len(chunks)
        if policy.sampler is not None:
            selected = [weight.selected for weight in policy.sampler.draw([self.chunk_tokens] * len(chunks), (0,))]
        return chunks, schedule_chunks(chunks, selected, keep_rows=policy.keep_rows)


def measure(case: Case, way: str) -> dict[str, float]:
    """Measure one step in this process: seconds, CPU seconds, peak bytes over what the process holds before the step,
    and, for chunked ways, the parts of the ideal peak."""
    with _runtime(case.spec) as runtime:
        map_large_blocks(fine=case.policy(way) is not None)  # as a run of this policy does
        if way == "checkpoint":
            for layer in runtime.model.layers.values():
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        read, policy = _Reader(case.num_tokens, runtime.mesh.device), case.policy(way)
        chunked = dataclasses.replace(runtime, chunking=policy)
        _peak(runtime, _program(case.chunk_tokens), read)  # load everything that is loaded once
        _peak(chunked, _program(min(_WARM_UP_CHUNKS * case.chunk_tokens, case.num_tokens)), read)
        weight_bytes = sum(local_shard(each).nbytes for each in runtime.model.parameters())
        found: dict[str, float] = {}
        if policy is not None:
            found["weight_bytes"] = 2 * weight_bytes  # gathered weights and their gradients
            found["stored_bytes"] = case.stored_bytes(way)
            token_bytes = case.spec.num_layers * case.spec.saved_bytes_per_token(4)
            found["chunk_bytes"] = case.kept_tokens(way) * token_bytes
        program = _program(case.num_tokens)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found["peak_bytes"] = _peak(chunked, program, read)
        found["seconds"] = time.perf_counter() - began_s
        found["cpu_s"] = time.process_time() - began_cpu_s
        return found


@dataclass(frozen=True, slots=True)
class Rounds:
    """The measurements of every way, turn by turn."""

    rounds: tuple[dict[str, dict[str, float]], ...]

    def typical(self, way: str) -> dict[str, float]:
        """Medians over the turns; of the peak, the highest."""
        turns = [each[way] for each in self.rounds]
        found = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        return {**found, "peak_bytes": max(turn["peak_bytes"] for turn in turns)}

    def ratio(self, way: str, other: str, name: str) -> float:
        """The figure ``name`` of ``way`` over that of ``other``: the median of the turns' ratios."""
        return statistics.median(each[way][name] / each[other][name] for each in self.rounds)


def spread() -> dict[str, tuple[float, float]]:
    """For each kind of sampling, over all samples: relative error of the mean gradient, and relative standard
    deviation."""
    spec = Case(num_tokens=1, num_chunks=1, num_layers=3, hidden_dim=64).spec
    num_tokens, half = _SPREAD_CHUNKS * _SPREAD_CHUNK_TOKENS, _SPREAD_CHUNKS // 2
    loss_tokens = [0] * half + [_SPREAD_CHUNK_TOKENS] * (_SPREAD_CHUNKS - half)
    with _runtime(spec) as runtime:
        program = _program(num_tokens)
        read = _Reader(num_tokens, runtime.mesh.device, num_without_loss=half * _SPREAD_CHUNK_TOKENS)

        def gradient(weights: tuple[ChunkWeight, ...]) -> torch.Tensor:
            policy = ChunkPolicy(chunk_tokens=_SPREAD_CHUNK_TOKENS, sampler=_Told(weights))  # type: ignore[arg-type]
            return _gradient(dataclasses.replace(runtime, chunking=policy), program, read)

        exact = gradient((EXACT,) * _SPREAD_CHUNKS)
        norm = exact.norm().item()
        found = {}
        for kind in (Sampling.BERNOULLI, Sampling.IMPORTANCE, Sampling.PUBLISHED):
            sampler = ChunkSampler(kind=kind, fraction=_SPREAD_FRACTION, seed=0)
            result = moments((gradient(weights), chance) for weights, chance in sampler.outcomes(loss_tokens))
            found[kind.value] = ((result.mean - exact).norm().item() / norm, result.variance**0.5 / norm)
        return found


@dataclass(frozen=True, slots=True)
class _Told:
    """A sampler that always draws these weights."""

    weights: tuple[ChunkWeight, ...]
    needs_loss_tokens: bool = False

    def draw(self, loss_tokens: Sequence[int], key: tuple[int, ...]) -> tuple[ChunkWeight, ...]:
        return self.weights


@contextmanager
def _runtime(spec: ModelSpec) -> Iterator[Runtime]:
    """The runtime of a single rank."""
    env = RankEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield build_runtime(
                TrainConfig(run=RunConfig(world_size=1, seed=3)), env, spec, init_method=f"file://{folder}/store"
            )
        finally:
            comm.shutdown()


def _program(num_tokens: int) -> RankProgram:
    group = AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0,))
    plan = StepPlan(
        step=0, strategy="benchmark", num_ranks=1, sequences=(Document(0, num_tokens),),
        microbatches=(Microbatch(ranks=(0,), groups=(group,), predicted_s=0.0, peak_bytes=0),), predicted_s=0.0,
        peak_bytes=0, cost_digest="", solver=SolveReport(status=SolveStatus.STATIC, objective_s=0.0, bound_s=0.0),
    )
    return compile_rank_program(plan, 0)


class _Reader:
    """Reads random tokens, the same for every way. The first ``num_without_loss`` carry no loss."""

    def __init__(self, num_tokens: int, device: torch.device, num_without_loss: int = 0) -> None:
        self._ids = np.random.default_rng(7).integers(0, 256, size=num_tokens + 1)
        self._device, self._num_without_loss = device, num_without_loss

    def __call__(self, spans: tuple[Span, ...]) -> TokenRows:
        rows = token_rows([self._ids[span.start_token : span.stop_token + 1] for span in spans], spans, self._device)
        unlabelled_T = rows.positions_T < self._num_without_loss
        return dataclasses.replace(rows, labels_T=rows.labels_T.masked_fill(unlabelled_T, IGNORE))


def _gradient(runtime: Runtime, program: RankProgram, read: _Reader) -> torch.Tensor:
    """Run a step and return its gradients as one float64 vector; ``.grad`` is empty afterwards."""
    accumulate_gradients(runtime, program, read, num_tokens=1)
    grads = [parameter.grad for parameter in runtime.model.parameters()]
    runtime.optimizer.zero_grad()
    return torch.cat([local_shard(grad).flatten().to(torch.float64) for grad in grads if grad is not None])


def _peak(runtime: Runtime, program: RankProgram, read: _Reader) -> int:
    """Run a step and return its peak bytes over what the process holds before it."""
    if runtime.mesh.device.type == "cpu":
        give_back_freed_memory()
    runtime.peak.reset()
    start_bytes = runtime.peak.read_bytes()
    accumulate_gradients(runtime, program, read, num_tokens=1)
    peak_bytes = runtime.peak.read_bytes() - start_bytes
    runtime.optimizer.zero_grad()
    return peak_bytes


def report(case: Case, measured: Rounds, spreads: dict[str, tuple[float, float]]) -> tuple[str, bool]:
    """Markdown, and whether all goals are met."""
    spec, num_rounds = case.spec, len(measured.rounds)
    lines = [
        f"{case.num_tokens:,} tokens, {case.num_chunks} chunks, {spec.num_layers} layers of {spec.hidden_dim}, fp32, "
        f"{platform.machine()}, torch {torch.__version__}, one thread; medians of {num_rounds} turns, highest peak", "",
        "| way | seconds | of whole | CPU | of whole | peak over start | should be | weights, gradients | K/V, dK/dV | "
        "chunk |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    goals = []
    for way in measured.rounds[0]:
        found = measured.typical(way)
        sizes = _ideal_bytes(found)
        parts = " | ".join(map(format_bytes, (sum(sizes), *sizes))) if sizes else "| | |"
        lines.append(
            f"| {way} | {format_seconds(found['seconds'])} | {measured.ratio(way, 'whole', 'seconds'):.2f} | "
            f"{format_seconds(found['cpu_s'])} | {measured.ratio(way, 'whole', 'cpu_s'):.2f} | "
            f"{format_bytes(found['peak_bytes'])} | {parts} |"
        )
        if way.startswith("seco"):  # SpaCO has no goal: its products outside the kernel's blocks take memory as well
            over = found["peak_bytes"] / sum(sizes) - 1
            goals.append((f"{way}: peak at most {_MOST_OVER:.0%} over what it should be (here {over:+.1%})",
                          over <= _MOST_OVER))
    rates = [each["seco"]["seconds"] / each["spaco 1/8"]["seconds"] for each in measured.rounds]
    ratio, cpu_ratio = (measured.ratio("seco", "spaco 1/8", name) for name in ("seconds", "cpu_s"))
    goals.append((f"SpaCO at 1/8 has at least {_LEAST_RATE} times SeCO's step rate (here {ratio:.2f}, of "
                  f"{min(rates):.2f} to {max(rates):.2f}; by processor seconds {cpu_ratio:.2f})", ratio >= _LEAST_RATE))
    lines += [
        "", *(f"goal {'met' if met else 'NOT met'}: {text}" for text, met in goals), "",
        f"Samples of half of {_SPREAD_CHUNKS} chunks, loss in the last half, all samples enumerated:", "",
        "| sampling | error of the mean | standard deviation |", "|---|---|---|",
        *(f"| {name} | {bias:.1e} | {deviation:.2f} |" for name, (bias, deviation) in spreads.items()),
    ]
    return "\n".join(lines) + "\n", all(met for _, met in goals)


def _ideal_bytes(found: dict[str, float]) -> tuple[int, ...]:
    """Bytes of weights and gradients, of stored K/V and dK/dV, and of activations; empty for ways without chunks."""
    if "chunk_bytes" not in found:
        return ()
    return int(found["weight_bytes"]), int(found["stored_bytes"]), int(found["chunk_bytes"])


def _measured(arguments: Sequence[str], way: str) -> dict[str, float]:
    """Measure one step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.chunked", *arguments, "--way", way]
    # huge pages, as ``longhaul train`` sets them on Linux (launch.environment)
    environ = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    print(f"{way:<14} {found['seconds']:7.2f} s, CPU {found['cpu_s']:7.2f} s", file=sys.stderr)
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunked", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--repeats", type=int, default=3, help="turns of all ways")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one measurement
    options = parser.parse_args(arguments)
    if options.tokens % options.chunks or options.hidden % 128:
        parser.error("--chunks must divide --tokens, and 128 must divide --hidden")
    case = Case(
        num_tokens=options.tokens, num_chunks=options.chunks, num_layers=options.layers, hidden_dim=options.hidden,
    )
    if options.way is not None:
        torch.set_num_threads(1)
        print(json.dumps(measure(case, options.way)))
        return 0
    measured = Rounds(tuple({way: _measured(arguments, way) for way in WAYS} for _ in range(options.repeats)))
    text, met = report(case, measured, spread())
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
