"""Reads the flags of ``longhaul plan`` into what is to be planned: cluster, model, cost model, limits, batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from planner.codec import suggest
from planner.cost.data_sheet import derive_cost, host_budget_bytes
from planner.cost.limits import PlanLimits
from planner.cost.machine_profile import load_cost
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.inputs.cluster import ClusterSpec
from planner.inputs.files import load_cluster, load_model, sources
from planner.inputs.length_generators import generate_lengths, length_names, length_table
from planner.inputs.lengths_file import batches_of_sequences, batches_of_tokens, drop_longer, read_lengths
from planner.inputs.model import ModelSpec
from planner.plan import MemoryAction, Sharding
from planner.pricing.breakdown import free_links
from planner.schedules.exchange import attention_kinds
from planner.units import format_bytes, parse_bytes, parse_tokens

POLICIES = {
    "keep": (MemoryAction.KEEP,),
    "swap": (MemoryAction.KEEP, MemoryAction.SWAP),
    "recompute": (MemoryAction.KEEP, MemoryAction.RECOMPUTE),
    "chunk": (MemoryAction.KEEP, MemoryAction.CHUNK),
    "auto": tuple(MemoryAction),
}
_MAX_DRAWN = 10_000_000
_MAX_DEVICES = 1_000_000  # takes some seconds to plan; more is probably a typing error


@dataclass(frozen=True, slots=True)
class Grid:
    """The devices of one data rank: ``tensor_parallel`` adjacent ones on each of ``num_stages`` pipeline stages."""

    tensor_parallel: int
    num_stages: int

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.num_stages

    def num_ranks(self, cluster: ClusterSpec) -> int:
        """Data ranks of the cluster."""
        return cluster.num_ranks // self.num_devices

    def remarks(self, cluster: ClusterSpec) -> tuple[str, ...]:
        """How the devices of the cluster are used; empty if a data rank is one device."""
        if self.num_devices == 1:
            return ()
        words = f"{self.num_ranks(cluster)} data ranks x {self.tensor_parallel} tensor-parallel devices"
        return (f"{words} x {self.num_stages} pipeline stages",)

    def node_size(self, cluster: ClusterSpec) -> int:
        """Data ranks of one pipeline stage on a node: ranks are numbered stage by stage."""
        return max(1, cluster.devices_per_node // self.tensor_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the flags describe, read and checked. ``grid``: devices of a data rank. ``sources``: (part, source) of the
    numbers used."""

    cluster: ClusterSpec
    grid: Grid
    model: ModelSpec
    cost: CostModel
    is_measured: bool
    limits: PlanLimits
    batches: tuple[tuple[int, ...], ...]
    lengths_name: str
    remarks: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]

    def price(self, cluster: ClusterSpec, budget_bytes: int, longest: int) -> CostModel:
        """The cost model for the same model on another cluster. A measured cost model is returned unchanged."""
        return self.cost if self.is_measured else _derive(cluster, self.grid, self.model, budget_bytes, longest)[0]

    @property
    def num_ranks(self) -> int:
        """Number of data ranks."""
        return self.grid.num_ranks(self.cluster)

    @property
    def free_cost(self) -> CostModel | None:
        """The cost model without communication; None if the cost model was measured, which has no such part."""
        if self.is_measured:
            return None
        cluster = free_links(self.cluster)
        return derive_cost(
            cluster, self.model, num_ranks=self.num_ranks, tensor_parallel=self.grid.tensor_parallel,
            num_stages=self.grid.num_stages, sharding=self.cost.sharding,
        )


def read_job(flags: argparse.Namespace) -> Job:
    """Read and check all flags. Raises SpecError for the first flag or file that is wrong."""
    kinds = attention_kinds(flags.attention)
    if flags.memory not in POLICIES:
        raise SpecError(f"--memory: {flags.memory!r} is none of {', '.join(POLICIES)}")
    if flags.lengths is None:
        raise SpecError(
            "longhaul plan: --lengths FILE|NAME is needed: a file with one sequence length (tokens) per line, or one "
            f"of {', '.join(length_names())}"
        )
    cluster, model = load_cluster(flags.cluster), load_model(flags.model)
    if cluster.num_ranks > _MAX_DEVICES:
        raise SpecError(f"{cluster.name} has {cluster.num_ranks} devices; at most {_MAX_DEVICES} are planned for")
    grid = _grid(flags, cluster)
    if model.num_query_heads % grid.tensor_parallel:
        raise SpecError(
            f"--tensor-parallel {grid.tensor_parallel} does not divide the {model.num_query_heads} query heads of "
            f"{model.name}"
        )
    batches, remarks = _batches(flags)
    limits = PlanLimits(
        device_budget_bytes=_budget_bytes(flags.device_budget, cluster),
        max_ulysses_degree=model.num_query_heads // grid.tensor_parallel,
        kinds=kinds,
        devices_per_node=grid.node_size(cluster),
        policies=POLICIES[flags.memory],
        host_budget_bytes=host_budget_bytes(cluster),
    )
    longest = max(max(batch) for batch in batches)
    if flags.cost is None:
        cost, remark = _derive(cluster, grid, model, limits.device_budget_bytes, longest)
    else:
        cost, remark = load_cost(flags.cost), ""
        if cost.provenance.model != model.name:
            remark = f"--cost {flags.cost} was measured for model {cost.provenance.model}, not for {model.name}"
        if cost.num_stages != grid.num_stages:
            raise SpecError(
                f"--cost {flags.cost}: priced for {cost.num_stages} pipeline stages, --pipeline-parallel is "
                f"{grid.num_stages}: set it to match"
            )
        if not _is_priced(limits, cost):
            raise SpecError(f"--memory {flags.memory}: {flags.cost} has no prices for it; leave --memory or --cost out")
    return Job(
        cluster=cluster, grid=grid, model=model, cost=cost, is_measured=flags.cost is not None, limits=limits,
        batches=batches,
        lengths_name=flags.lengths, remarks=(*grid.remarks(cluster), *remarks, *([remark] if remark else [])),
        sources=(*sources(cluster, model), *_length_source(flags.lengths)),
    )


def _is_priced(limits: PlanLimits, cost: CostModel) -> bool:
    """Whether the cost model has prices for at least one of the allowed policies."""
    others = set(limits.policies) - {MemoryAction.KEEP}
    priced = {MemoryAction.CHUNK} if cost.chunks is not None else set()
    if cost.activation is not None:
        priced |= {MemoryAction.SWAP, MemoryAction.RECOMPUTE}
    return not others or bool(others & priced)


def count(text: str | None, flag: str) -> int | None:
    """A flag's value as a whole number of at least 1; None if it was not given. Raises SpecError."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) > 0):
        raise SpecError(f"{flag}: expected a whole number of at least 1, got {text[:40]!r}")
    return int(text)


def _grid(flags: argparse.Namespace, cluster: ClusterSpec) -> Grid:
    grid = Grid(
        tensor_parallel=count(flags.tensor_parallel, "--tensor-parallel") or 1,
        num_stages=count(flags.pipeline_parallel, "--pipeline-parallel") or 1,
    )
    if cluster.num_ranks % grid.num_devices:
        raise SpecError(
            f"--tensor-parallel {grid.tensor_parallel} x --pipeline-parallel {grid.num_stages} must divide the "
            f"{cluster.num_ranks} devices of {cluster.name}"
        )
    if grid.num_stages > 1 and flags.memory == "chunk":
        raise SpecError("--memory chunk: chunks are not priced with pipeline stages; leave one of them out")
    return grid


def _derive(
    cluster: ClusterSpec, grid: Grid, model: ModelSpec, budget_bytes: int, longest: int
) -> tuple[CostModel, str]:
    """The data sheet's cost model, and a remark for the user. It is priced for gather_once, the default of training; if
    the longest sequence does not fit next to a full copy of the model, and there are no stages, for zero3."""
    num_ranks, tensor = grid.num_ranks(cluster), grid.tensor_parallel
    cost = derive_cost(cluster, model, num_ranks=num_ranks, tensor_parallel=tensor, num_stages=grid.num_stages)
    if grid.num_stages > 1 or cost.max_local_tokens(budget_bytes) * num_ranks >= longest:
        return cost, ""
    lean = derive_cost(cluster, model, num_ranks=num_ranks, tensor_parallel=tensor, sharding=Sharding.ZERO3)
    remark = (
        f"priced with zero3: gather_once needs {format_bytes(cost.memory.fixed_bytes)} per device before the first "
        f"token and leaves too little of {format_bytes(budget_bytes)} for {longest} tokens; train with "
        "--parallel.sharding zero3"
    )
    return lean, remark


def _batches(flags: argparse.Namespace) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """The batches to plan, and remarks on sequences that were dropped."""
    if flags.batch_sequences is not None and flags.batch_tokens is not None:
        raise SpecError("longhaul plan: give --batch-sequences or --batch-tokens, not both")
    num_steps = count(flags.steps, "--steps") or 1
    num_tokens = _tokens(flags.batch_tokens, "--batch-tokens")
    num_sequences = count(flags.batch_sequences, "--batch-sequences") or 512
    max_tokens = _tokens(flags.max_length, "--max-length")
    if _is_name(flags.lengths):
        lengths, num_dropped = _drawn(flags, num_steps, num_sequences, num_tokens, max_tokens)
    else:
        if flags.seed is not None:
            raise SpecError("--seed belongs to named lengths; a file's lengths are taken in order: leave it out")
        lengths, num_dropped = read_lengths(flags.lengths), 0
        if max_tokens is not None:
            lengths, num_dropped = drop_longer(lengths, max_tokens)
    remarks = []
    if max_tokens is not None:
        remarks.append(f"{num_dropped} of {len(lengths) + num_dropped} sequences over {max_tokens} tokens dropped")
    found: Iterator[tuple[int, ...]] = (
        batches_of_tokens(lengths, num_tokens) if num_tokens else batches_of_sequences(lengths, num_sequences)
    )
    return tuple(islice(found, num_steps)), remarks


def _is_name(text: str) -> bool:
    """Whether ``--lengths`` names a built-in length distribution; a file of the same name can be given as ``./name``.
    Raises SpecError if it is neither a name nor a file."""
    if text in length_names():
        return True
    if "/" not in text and not Path(text).exists():
        raise SpecError(f"--lengths: {text!r} is neither a file nor known lengths{suggest(text, length_names())}")
    return False


def _drawn(
    flags: argparse.Namespace, num_steps: int, num_sequences: int, num_tokens: int | None, max_tokens: int | None
) -> tuple[tuple[int, ...], int]:
    """As many lengths as the steps need, and how many longer ones were dropped."""
    table = length_table(flags.lengths)
    if max_tokens is not None and max_tokens < table.shortest:
        raise SpecError(
            f"every sequence is longer than --max-length {max_tokens}; the shortest of {table.name} has "
            f"{table.shortest} tokens"
        )
    kept: list[int] = []
    total = num_dropped = 0
    for length in generate_lengths(table.name, seed=_seed(flags.seed)):
        if max_tokens is not None and length > max_tokens:
            num_dropped += 1
        else:
            kept.append(length)
            total += min(length, num_tokens or length)  # a longer sequence is a batch of its own
        # A batch of tokens ends where the next sequence does not fit, so one more batch than requested is drawn.
        enough = total >= (num_steps + 1) * num_tokens if num_tokens else len(kept) == num_steps * num_sequences
        if enough:
            break
        if len(kept) + num_dropped >= _MAX_DRAWN:
            raise SpecError(f"{_MAX_DRAWN} sequences of {table.name} are not enough: ask for fewer steps or tokens")
    return tuple(kept), num_dropped


def _length_source(name: str) -> tuple[tuple[str, str], ...]:
    if name not in length_names():
        return ((f"lengths {name}", "your own file"),)
    table = length_table(name)
    lines = ((f"lengths {name}", table.source),)
    return (*lines, (f"lengths {name}", table.note)) if table.note else lines


def _seed(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise SpecError(f"--seed: expected a whole number of at least 0, got {text!r}")
    return int(text)


def _budget_bytes(text: str | None, cluster: ClusterSpec) -> int:
    device = cluster.device
    if text is None:
        return device.memory_bytes - device.reserved_bytes
    budget = parse_bytes(text, what="--device-budget")
    if not 0 < budget <= device.memory_bytes:
        memory = format_bytes(device.memory_bytes)
        raise SpecError(f"--device-budget: {text} is not within the {memory} of {device.name}")
    return budget


def _tokens(text: str | None, flag: str) -> int | None:
    if text is None:
        return None
    tokens = parse_tokens(text, what=flag)
    if tokens < 1:
        raise SpecError(f"{flag}: expected at least 1 token, got {text!r}")
    return tokens
