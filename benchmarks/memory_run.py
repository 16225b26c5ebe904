"""One measurement of activation memory in this process: a single rank and a local sequence, with the trainer's model,
engine and memory code. ``benchmarks.memory`` starts a fresh process for each measurement and compares them."""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memory.peak import give_back_freed_memory, map_large_blocks
from parallel import comm
from parallel.program import compile_rank_program
from planner.inputs.files import load_model
from planner.measured.copy_times import Interval, copy_seconds
from planner.plan import AttentionKind
from planner.units import KIB
from trainer.build import build_runtime
from trainer.data.batch import token_rows
from trainer.prices.calibration import MeasuredShape, calibrate, design_plan
from trainer.prices.layer_profile import profile_layer
from trainer.rank_env import RankEnv
from trainer.settings.tree import DataConfig, MemoryConfig, PlanConfig, RunConfig, TrainConfig
from trainer.step.one_step import accumulate_gradients, train_step
from trainer.step.runtime import Runtime

VOCABULARY = 512
MLP_IN_PIECES = " + MLP"
"""Suffix of ways whose MLP runs in pieces."""
_WARM_UP_TOKENS = 64
_ALONE = MeasuredShape(AttentionKind.LOCAL, 1)
_SAMPLE_S = 0.004
_PADDING_BYTES = 16 * 4 * KIB
"""Padding of a layer in the tier: at most 16 tensors, each padded by at most 4 KiB."""
AMPLE = "keep ample"
"""A way of ``predict``: ``keep`` in a run whose steps take far less than the device budget."""
_SCARCE_BUDGET = "1 MiB"
"""A device budget so small that memory may bind in every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryWorkload:
    """The model and how it runs. ``dim``: hidden size; heads have 64, the MLP has three times ``dim``. ``repeats``:
    steps in a process. ``chunk_tokens``: of seco. ``mlp_chunk_tokens``: of ways whose MLP runs in pieces."""

    num_layers: int = 8
    dim: int = 256
    repeats: int = 2
    chunk_tokens: int = 256
    mlp_chunk_tokens: int = 256
    seed: int = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one way took. ``peak_bytes``: peak resident set over that of the process just before the steps;
    ``resident_bytes``: the whole peak. ``fits`` False: an allocation hit the limit, and the other figures mean
    nothing."""

    way: str
    length: int
    fits: bool = True
    peak_bytes: int = 0
    resident_bytes: int = 0
    step_s: float = 0.0
    cpu_s: float = 0.0
    loss: float = 0.0
    swapped_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Predicted and measured peaks of the whole resident set, and of bytes in the tier (0 without one)."""

    way: str
    length: int
    predicted_bytes: int
    measured_bytes: int
    tier_predicted_bytes: int = 0
    tier_measured_bytes: int = 0


@dataclass(slots=True)
class Bench:
    """A runtime for one way, ready to run steps."""

    way: str
    workload: MemoryWorkload
    runtime: Runtime
    ids: np.ndarray
    hooks: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)

    def read(self, spans: Any) -> Any:
        (span,) = spans
        return token_rows([self.ids[span.start_token : span.stop_token + 1]], spans, torch.device("cpu"))

    def step(self, length: int) -> float:
        """Run forward and backward and return the mean loss. Gradients are dropped."""
        program = compile_rank_program(design_plan(1, _ALONE, (length,)), 0)
        with self.hooks():
            loss, _ = accumulate_gradients(self.runtime, program, self.read, num_tokens=length)
        self.runtime.optimizer.zero_grad()
        return loss / length

    def whole_step(self, length: int) -> int:
        """Run a step with the optimizer at learning rate 0 and return the peak resident set in bytes. It has two
        microbatches of one sequence each, so that the second one runs beside the gradients of the first."""
        plan = design_plan(1, _ALONE, (length, length))
        groups = [replace(plan.microbatches[0].groups[0], sequences=(number,)) for number in range(2)]
        plan = replace(plan, microbatches=tuple(replace(plan.microbatches[0], groups=(group,)) for group in groups))
        program = compile_rank_program(plan, 0)
        give_back_freed_memory()
        return train_step(self.runtime, program, self.read, num_tokens=2 * length, lr=0.0).peak_bytes[0]


@contextlib.contextmanager
def bench(way: str, length: int, workload: MemoryWorkload, *, scarce: bool = False) -> Iterator[Bench]:
    """A runtime for ``way``, for sequences of at most ``length`` tokens. ``scarce``: as in a run where memory may bind,
    in which blocks are mapped finely whatever the policy."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder:
        env = RankEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
        config = TrainConfig(
            run=RunConfig(dir=folder, seed=workload.seed, world_size=1, device="cpu"),
            data=DataConfig(max_length=length, tokens_per_step=length), memory=_memory(way, workload),
            plan=PlanConfig(device_budget=_SCARCE_BUDGET if scarce else "auto"),
        )
        heads = workload.dim // 64
        spec = replace(
            load_model("tiny"), num_layers=workload.num_layers, hidden_dim=workload.dim, ffn_dim=3 * workload.dim,
            num_query_heads=heads, num_kv_heads=max(1, heads // 2), head_dim=64, vocab_size=VOCABULARY,
        )
        runtime = build_runtime(config, env, spec, init_method=f"file://{folder}/store")
        ids = np.random.default_rng(workload.seed).integers(0, VOCABULARY, size=length + 1)
        if way != "keep":
            map_large_blocks(fine=True)  # for torch's ways as well, so that the allocator favours none
        made = Bench(way, workload, runtime, ids)
        _add_peer(made, Path(folder))
        try:
            yield made
        finally:
            runtime.memory.close()
            comm.shutdown()


def _memory(way: str, workload: MemoryWorkload) -> MemoryConfig:
    plain = way.removesuffix(MLP_IN_PIECES)
    if plain != way:
        return replace(_memory(plain, workload), mlp_chunk_tokens=workload.mlp_chunk_tokens)
    policy, _, detail = way.partition(" ")  # detail: the fraction of swap, the tier of seco
    if policy == "swap":
        swap_fraction = None if detail == "measured" else float(detail)
        return MemoryConfig(policy="swap", tier="disk", swap_fraction=swap_fraction)
    if policy == "seco":
        return MemoryConfig(policy="seco", chunk_tokens=workload.chunk_tokens, tier=detail or None)
    return MemoryConfig(policy="recompute" if way == "recompute" else "keep")


def _add_peer(made: Bench, folder: Path) -> None:
    """Put torch's own way, where ``made`` is for one, around plain autograd."""
    layers = made.runtime.model.layers.values()
    if made.way == "checkpoint":
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    elif made.way == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _save_attention)
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    elif made.way == "save_on_cpu":
        made.hooks = torch.autograd.graph.save_on_cpu
    elif made.way == "hooks to disk":
        made.hooks = functools.partial(_offload_everything, folder)


def _save_attention(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return CheckpointPolicy.MUST_SAVE if operator is attention else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _offload_everything(folder: Path) -> Iterator[None]:
    """Torch's saved-tensor hooks with a file for each tensor, as its documentation shows; parameters stay."""
    numbers = iter(range(1 << 60))

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or tensor.is_leaf or tensor.numel() < 1024:
            return tensor
        file = folder / f"saved-{next(numbers)}"
        np.ascontiguousarray(tensor.detach().numpy()).tofile(file)
        return file, tuple(tensor.shape), tensor.detach().numpy().dtype

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        file, shape, dtype = saved
        tensor = torch.from_numpy(np.fromfile(file, dtype=dtype)).view(shape)
        file.unlink()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def measure(way: str, length: int, workload: MemoryWorkload, *, limit_bytes: int = 0) -> Measured:
    """Run steps over one sequence of ``length`` tokens; the quickest counts. ``limit_bytes``: limit of the process's
    writable memory, enforced by the system (RLIMIT_DATA); 0: none."""
    limit_data(limit_bytes)
    try:
        with bench(way, length, workload) as made:
            made.step(min(length, _WARM_UP_TOKENS))  # load everything that is loaded once
            give_back_freed_memory()
            peak = made.runtime.peak
            peak.reset()
            start_bytes = peak.read_bytes()
            tier = made.runtime.memory.tier
            written_bytes = tier.written_bytes if tier is not None else 0
            walls, cpus, loss = [], [], 0.0
            for _ in range(workload.repeats):
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                loss = made.step(length)
                walls.append(time.perf_counter() - began_s)
                cpus.append(time.process_time() - began_cpu_s)
            swapped_bytes = (tier.written_bytes - written_bytes) // workload.repeats if tier is not None else 0
            return Measured(
                way=way, length=length, peak_bytes=peak.read_bytes() - start_bytes, resident_bytes=peak.read_bytes(),
                step_s=min(walls), cpu_s=min(cpus), loss=loss, note=made.runtime.memory.note,
                swapped_bytes=swapped_bytes,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Measured(way=way, length=length, fits=False)


def limit_data(limit_bytes: int) -> None:
    """Limit this process's writable memory; 0: no limit."""
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "new thread" in str(error)


def data_bytes() -> int:
    """Writable memory of this process now, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * KIB
    raise OSError("no VmData in /proc/self/status: this needs Linux")


def longest_dense(workload: MemoryWorkload, budget_bytes: int, most_tokens: int) -> dict[str, int]:
    """Bisect for the longest sequence that trains with all activations kept, within ``budget_bytes`` over what the
    process has after a first small step. Returns its length and the limit, which the other ways get as well."""
    with bench("keep", most_tokens, workload) as made:
        map_large_blocks(fine=True)
        made.step(_WARM_UP_TOKENS)
        limit_bytes = data_bytes() + budget_bytes
        limit_data(limit_bytes)
        low, high = _WARM_UP_TOKENS, most_tokens
        while high - low > max(8, low // 64):
            middle = (low + high) // 2
            if _trains(made, middle):
                low = middle
            else:
                high = middle
            gc.collect()
        return {"length": low, "limit_bytes": limit_bytes}


def _trains(made: Bench, length: int) -> bool:
    try:
        made.step(length)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        made.runtime.optimizer.zero_grad()
        return False
    return True


def predict(way: str, lengths: tuple[int, ...], workload: MemoryWorkload) -> list[Predicted]:
    """The peaks that a run's own calibration predicts for steps of these lengths, and the measured ones."""
    found = []
    with bench("keep" if way == AMPLE else way, max(lengths), workload, scarce=way != AMPLE) as made:
        cost = calibrate(made.runtime, (_ALONE,), max_length=max(lengths), machine="here").cost
        tier = made.runtime.memory.tier
        made.whole_step(min(lengths))  # the first step lacks optimizer state until its end
        for length in lengths:
            measured_bytes = made.whole_step(length)
            found.append(Predicted(
                way=way, length=length, predicted_bytes=cost.device_bytes(length), measured_bytes=measured_bytes,
                tier_predicted_bytes=0 if tier is None else _tier_bytes(made.runtime, length),
                tier_measured_bytes=made.runtime.memory.peak_tier_bytes,
            ))
    return found


def _tier_bytes(runtime: Runtime, length: int) -> int:
    """Bytes that one sequence puts into the tier: a layer's profile times the policy's fractions, with padding."""
    profile, policy = profile_layer(runtime, num_tokens=length), runtime.memory.policy
    layer = sum(each.bytes_per_token * policy.split(each.name, length)[0] for each in profile.tensors)
    if policy.swap_pair:
        layer += profile.pair_bytes_per_token * length
    return int(layer + _PADDING_BYTES) * (len(runtime.model.layers) - policy.num_kept_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One step over time. ``samples``: (seconds since the step began, resident bytes over those at its start)."""

    way: str
    length: int
    samples: tuple[tuple[float, int], ...]
    intervals: tuple[Interval, ...] = ()
    hidden_share: float = 1.0


def course(way: str, length: int, workload: MemoryWorkload) -> Course:
    """Run a step after a first one, and sample the resident set every few milliseconds."""
    with bench(way, length, workload) as made:
        made.step(length)
        memory = made.runtime.memory
        memory.record(True)
        give_back_freed_memory()
        samples: list[tuple[float, int]] = []
        done = threading.Event()
        start_bytes, began_s = _resident_bytes(), time.perf_counter()

        def sample() -> None:
            while not done.wait(_SAMPLE_S):
                samples.append((time.perf_counter() - began_s, _resident_bytes() - start_bytes))

        thread = threading.Thread(target=sample)
        thread.start()
        made.step(length)
        done.set()
        thread.join()
        ahead_s = memory.timeline.zero_s - began_s
        intervals = tuple(
            replace(each, start_s=each.start_s + ahead_s, stop_s=each.stop_s + ahead_s)
            for each in memory.timeline.read()
        )
        copy_s, hidden_s = copy_seconds(intervals)
        hidden_share = hidden_s / copy_s if copy_s else 1.0
        return Course(way=way, length=length, samples=tuple(samples), intervals=intervals, hidden_share=hidden_share)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
