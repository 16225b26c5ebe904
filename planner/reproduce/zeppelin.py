"""Zeppelin's figures 8 to 12: TE CP, routing, zones, both, and remapping, on its clusters by bytes and FLOPs alone.

Zones come from ``planner.strategies.zeppelin`` on the cost model that ``longhaul plan`` would derive, the moves of the
remap from ``planner.schedules.remap``, routed transfers from ``planner.schedules.routing``; ``zeppelin_layer`` adds
them up to one layer, forward and backward. A speed-up is TE CP's seconds of all batches over ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.inputs.cluster import ClusterSpec
from planner.inputs.files import load_cluster, load_model
from planner.inputs.length_generators import generate_lengths
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind
from planner.pricing.problem import StepProblem
from planner.reproduce.table import Reproduction, Row, Rule, load_data
from planner.reproduce.zeppelin_layer import Layer, ZoneGroup
from planner.strategies.zeppelin import plan_zeppelin
from planner.units import parse_rate

Gains = dict[tuple[str, int, str], float]
"""Speed-up of all of Zeppelin by model, devices and lengths."""
UNLIMITED_BYTES = 2**62
ARXIV = "arxiv"
FITTED_HOP = Rule(name="ring transfer, which the NIC's rate is fitted on", below=0.02, above=0.02)
CASE = Rule(name="timeline cases", below=0.25, above=0.25)
ABLATION = Rule(name="ablation, assumed lengths", below=0.25, above=0.25)
ORDER = Rule(name="order of the ablation", below=0.0, above=0.0)
FLAT = Rule(name="TE CP's scaling (paper: nearly flat)", below=0.10, above=0.10)
LARGER = Rule(name="ratios only known to be above 1", below=0.0, above=math.inf)
HEADLINE = Rule(name="headline over our grid", below=0.25, above=0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterB:
    """A built-in cluster with another link inside the node."""

    like: str
    intra_bytes_per_s: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    mean_tokens: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """Published figures; speed-ups are over TE CP."""

    ring_hop_ms: float
    routed_hop_ms: float
    small_te_ms: float
    small_zeppelin_ms: float
    routing: float
    engine: float
    engine_routing: float
    full: float
    mean: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GridModel:
    name: str
    tensor_parallel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every model on every number of devices with every set of lengths."""

    models: tuple[GridModel, ...]
    devices: tuple[int, ...]
    lengths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeppelinData:
    """``data/zeppelin.yaml``."""

    source: str
    num_batches: int
    seed: int
    device_tokens: int
    cluster_a: str
    cluster_b: ClusterB
    model_3b: ModelSpec
    arxiv: LogNormal
    printed: Printed
    small_sequence_tokens: int
    ablation_devices: int
    scaling_devices: tuple[int, int]
    grid: Grid
    compared_model: str
    short_lengths: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantTimes:
    """Seconds of one layer over all batches of a configuration."""

    te_cp_s: float
    routing_s: float
    engine_s: float
    engine_routing_s: float
    full_s: float

    @property
    def speedup(self) -> float:
        """All of Zeppelin over TE CP."""
        return self.te_cp_s / self.full_s


def reproduce_zeppelin() -> Reproduction:
    """Takes some seconds, nearly all of them in the partitioner."""
    data = load_data(ZeppelinData, "zeppelin")
    gains = _grid_gains(data, data.cluster_a, data.grid.models)
    rows = [
        *_case_rows(data), *_ablation_rows(data), _scaling_row(data), *_compared_rows(data, gains),
        Row(name=f"mean speed-up over {len(gains)} configurations", paper=data.printed.mean,
            ours=mean(gains.values()), rule=HEADLINE),
        Row(name="largest speed-up", paper=data.printed.largest, ours=max(gains.values()), rule=HEADLINE),
    ]
    return Reproduction(system="zeppelin", title=data.source, rows=tuple(rows), assumptions=_assumptions(data, gains))


def layer_of(cluster: ClusterSpec, model: ModelSpec, num_devices: int, tensor_parallel: int = 1) -> Layer:
    """One layer on as many nodes as ``num_devices`` need."""
    num_nodes = -(-num_devices // cluster.devices_per_node)
    return Layer(
        cluster=replace(cluster, num_nodes=num_nodes), model=model, num_ranks=num_devices // tensor_parallel,
        tensor_parallel=tensor_parallel,
    )


def cluster_of(data: ZeppelinData, name: str) -> ClusterSpec:
    """A built-in cluster; with the name that B is like, B."""
    cluster = load_cluster(name)
    if name == data.cluster_b.like:
        link = replace(cluster.intra_node, bytes_per_s=parse_rate(data.cluster_b.intra_bytes_per_s))
        return replace(cluster, intra_node=link)
    return cluster


def batches_of(data: ZeppelinData, lengths: str, num_tokens: int) -> list[list[int]]:
    """Consecutive batches of exactly ``num_tokens``, which is also the longest sequence: longer ones are dropped, and
    the last one of a batch is cut to what is left."""
    source = _draw_arxiv(data) if lengths == ARXIV else generate_lengths(lengths, seed=data.seed)
    kept = (size for size in source if size <= num_tokens)
    batches = []
    for _ in range(data.num_batches):
        batch, left = list[int](), num_tokens
        while left:
            batch.append(min(next(kept), left))
            left -= batch[-1]
        batches.append(batch)
    return batches


def zones_of(layer: Layer, batches: list[list[int]]) -> list[tuple[ZoneGroup, ...]]:
    """Our partitioner's one microbatch of each batch, memory not being a limit."""
    cost = derive_cost(
        layer.cluster, layer.model, num_ranks=layer.num_ranks, tensor_parallel=layer.tensor_parallel
    )
    limits = PlanLimits(
        device_budget_bytes=UNLIMITED_BYTES, max_ulysses_degree=1, kinds=(AttentionKind.RING,),
        devices_per_node=layer.node_ranks,
    )
    zones = []
    for lengths in batches:
        found = plan_zeppelin(
            StepProblem(lengths=tuple(lengths), num_ranks=layer.num_ranks, cost=cost, limits=limits)
        )
        (microbatch,) = found.groups
        groups = microbatch if isinstance(microbatch, tuple) else (microbatch,)
        zones.append(tuple(
            ZoneGroup(ranks=group.ranks, lengths=tuple(lengths[index] for index in group.sequences)) for group in groups
        ))
    return zones


def variant_times(layer: Layer, batches: list[list[int]]) -> VariantTimes:
    """All variants over these batches; those with zones share them."""
    zones = zones_of(layer, batches)
    return VariantTimes(
        te_cp_s=sum(layer.te_cp_s(lengths) for lengths in batches),
        routing_s=sum(layer.te_cp_s(lengths, routed=True) for lengths in batches),
        engine_s=sum(layer.seconds(groups, routed=False, remapped=False) for groups in zones),
        engine_routing_s=sum(layer.seconds(groups, routed=True, remapped=False) for groups in zones),
        full_s=sum(layer.seconds(groups, routed=True, remapped=True) for groups in zones),
    )


def _draw_arxiv(data: ZeppelinData) -> Iterator[int]:
    random = np.random.Generator(np.random.Philox(data.seed))
    center = math.log(data.arxiv.mean_tokens) - data.arxiv.sigma**2 / 2
    while True:
        yield max(1, round(float(random.lognormal(center, data.arxiv.sigma))))


def _case_layer(data: ZeppelinData, num_devices: int) -> Layer:
    return layer_of(cluster_of(data, data.cluster_a), data.model_3b, num_devices)


def _case_rows(data: ZeppelinData) -> list[Row]:
    """Figure 12, 3B on 16 devices of A."""
    layer, printed = _case_layer(data, data.ablation_devices), data.printed
    num_small = data.ablation_devices * data.device_tokens // data.small_sequence_tokens
    small = variant_times(layer, [[data.small_sequence_tokens] * num_small])
    direct_s, routed_s = (
        layer.hop_s(data.device_tokens, between_nodes=True, routed=routed) for routed in (False, True)
    )
    figures = (
        ("64k sequence: transfer of a round, ms", printed.ring_hop_ms, direct_s, FITTED_HOP),
        ("64k sequence: routed transfer of a round, ms", printed.routed_hop_ms, routed_s, CASE),
        ("small sequences: layer with TE CP, ms", printed.small_te_ms, small.te_cp_s, CASE),
        ("small sequences: layer with Zeppelin, ms", printed.small_zeppelin_ms, small.full_s, CASE),
    )
    return [Row(name=name, paper=paper, ours=1000 * seconds, rule=rule) for name, paper, seconds, rule in figures]


def _ablation_rows(data: ZeppelinData) -> list[Row]:
    """Figure 11. The order counts how many of the three steps from routing to all of it gain."""
    layer, printed = _case_layer(data, data.ablation_devices), data.printed
    times = variant_times(layer, batches_of(data, ARXIV, data.ablation_devices * data.device_tokens))
    variants = (
        ("routing only", printed.routing, times.routing_s), ("zones only", printed.engine, times.engine_s),
        ("zones and routing", printed.engine_routing, times.engine_routing_s),
        ("zones, routing and remap", printed.full, times.full_s),
    )
    gained = sum(later[2] < earlier[2] for earlier, later in zip(variants, variants[1:], strict=False))
    return [
        *(Row(name=f"ablation: {name}", paper=paper, ours=times.te_cp_s / seconds, rule=ABLATION)
          for name, paper, seconds in variants),
        Row(name="ablation: steps that gain, in this order", paper=len(variants) - 1, ours=gained, rule=ORDER),
    ]


def _scaling_row(data: ZeppelinData) -> Row:
    """Figure 9: tokens grow with the devices, so tokens a second are devices over seconds."""
    rates = []
    for num_devices in data.scaling_devices:
        batches = batches_of(data, ARXIV, num_devices * data.device_tokens)
        layer = _case_layer(data, num_devices)
        rates.append(num_devices / sum(layer.te_cp_s(lengths) for lengths in batches))
    few, many = data.scaling_devices
    return Row(name=f"TE CP: tokens/s on {many} over {few} devices", paper=1.0, ours=rates[1] / rates[0], rule=FLAT)


def _grid_gains(data: ZeppelinData, cluster_name: str, models: tuple[GridModel, ...]) -> Gains:
    cluster, gains = cluster_of(data, cluster_name), {}
    for choice in models:
        model = data.model_3b if choice.name == data.model_3b.name else load_model(choice.name)
        for num_devices in data.grid.devices:
            layer = layer_of(cluster, model, num_devices, choice.tensor_parallel)
            for lengths in data.grid.lengths:
                batches = batches_of(data, lengths, num_devices * data.device_tokens)
                gains[choice.name, num_devices, lengths] = variant_times(layer, batches).speedup
    return gains


def _compared_rows(data: ZeppelinData, gains_a: Gains) -> list[Row]:
    """Figures 8 and 10 in words: A gains more than B, and short documents more than long ones."""
    name = data.compared_model
    on_b = _grid_gains(data, data.cluster_b.like, tuple(model for model in data.grid.models if model.name == name))
    on_a = {key: gains_a[key] for key in on_b}
    short, long = (
        sum(gain for key, gain in on_a.items() if key[2] == lengths) for lengths in (data.short_lengths, ARXIV)
    )
    figures = (
        (f"{name}: mean speed-up on A over that on B", sum(on_a.values()) / sum(on_b.values())),
        (f"{name}: mean speed-up of {data.short_lengths} over {ARXIV}", short / long),
    )
    return [Row(name=text, paper=1.0, ours=ratio, rule=LARGER) for text, ratio in figures]


def _assumptions(data: ZeppelinData, gains: Gains) -> tuple[str, ...]:
    grid, arxiv, cluster_a = data.grid, data.arxiv, load_cluster(data.cluster_a)
    degrees = ", ".join(f"{model.name} {model.tensor_parallel}" for model in grid.models)
    by_devices = ", ".join(
        f"{mean(gain for key, gain in gains.items() if key[1] == num_devices):.3g} on {num_devices}"
        for num_devices in grid.devices
    )
    return (
        "published figures: a second-hand reading; of figure 8 only mean and maximum; the zones' 3.2 is an 'up to'",
        f"A, device: {cluster_a.device.source}",
        f"A, links: {cluster_a.intra_node.source}; {cluster_a.inter_node.source}",
        "no NIC rate meets both transfers of the 64k sequence on A: 0.411 ms is 127 GB/s, its four NICs have 100",
        f"B: guess, {data.cluster_b.like} with {data.cluster_b.intra_bytes_per_s} of NVLink; one 400 Gb/s NIC a device",
        f"{data.model_3b.name}: {data.model_3b.source}",
        f"guess: {data.device_tokens} tokens a device; the ablation is 3B on {data.ablation_devices} devices of A",
        f"arxiv: guess, log-normal, sigma {arxiv.sigma}, mean {arxiv.mean_tokens} tokens (47,930 bytes a document in "
        "the Pile, 3 bytes a token); github and prolong: the corpora of longhaul plan --lengths",
        f"guess: {data.num_batches} batches of exactly their tokens; longer sequences dropped, the last one cut",
        f"small sequences: guess, {data.small_sequence_tokens} tokens each; the time is read as one whole layer",
        f"grid, declared before the first run: tensor-parallel {degrees}; {', '.join(map(str, grid.devices))} devices "
        f"of A; lengths {', '.join(grid.lengths)}; without MoE 8x550M, whose shape is not known",
        f"TE CP slows down with every device, so a speed-up over it depends on their number; here: {by_devices}",
        "zones: our zeppelin partitioner (5, 10 or 20 % slack a node, 25 % a rank) on derived costs, the same in every "
        "variant",
        "guess: routing not pipelined, all NICs of a node as proxies, both directions at full rate",
        "guess: remap in four exchanges a layer, each as long as its busiest link",
        "TE CP: one ring of all ranks; head, embedding, optimizer and gradient reduction left out of all variants",
        "kernels at one rate at every length; no launches, no latency",
    )
