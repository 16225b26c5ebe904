"""Replays a plan operation by operation: a second, independent estimate of its step time, with a band, and of what each
rank waits for.

``planner.pricing.simulate`` prices microbatches with the search's coefficients; this module uses none of them. It walks
every group's schedule round by round with a clock per rank: kernels by the spans they get, messages from when both ends
have posted them, NICs shared by ranks that send at the same time, copies to the host in parallel with compute.

Besides the curves of ``planner.replay.operations``, these are approximations:
- Layers are alike: the first REPLAYED_LAYERS forward and backward are replayed; the others continue at the pace of the
  last one (of the slowest rank among those that groups connect). A test compares this with replaying all layers.
- Messages that a group posts together and that share a port or a NIC end together. Groups of one wave share a NIC by
  their mean use of it. Microbatches in different waves (see ``planner.replay.waves``), and collectives over all ranks,
  do not slow each other down.
- zero3: waves are the rounds that the runtime executes (``planner.pricing.lockstep``), with every rank in every gather.
  Gathers are prefetched one layer ahead, and ranks wait for each other once per wave, not once per layer.
- The tensor-parallel peers of a rank do the same things at the same time.
- A swapped layer is copied while it is computed, forward and backward; the last KEPT_LAYERS are never swapped.
- A microbatch in chunks runs forward once more before its wave. Its matrix products have the size of a chunk; attention
  and its messages are those of the whole microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from planner.cost.data_sheet import GRADIENT_BYTES, OPTIMIZER_PASS_BYTES
from planner.cost.fits import MemoryFit
from planner.errors import SpecError
from planner.inputs.cluster import ClusterSpec
from planner.inputs.model import ModelSpec
from planner.plan import Sharding, StepPlan
from planner.pricing.simulate import step_lengths
from planner.replay.flows import has_closed_form
from planner.replay.lanes import LaneEvent, LaneRecorder
from planner.replay.layer import KEPT_LAYERS, REPLAYED_LAYERS, Layer, all_layers, layers, windows
from planner.replay.operations import Curves, End, load_curves, machine_model
from planner.replay.state import DataRanks, TimeLedger
from planner.replay.waves import Wave, WaveShape, contended, first_pass, free_links, split_waves, wave_shape
from planner.replay.work import FloatArray
from planner.schedules.layout import head_degree

SCHEME = (
    f"{REPLAYED_LAYERS} layers replayed forward and backward, the others at their pace; messages of a round that share "
    "a NIC end together; groups of one wave of microbatches share a NIC by their mean use, different waves do not"
)
ZERO3_SCHEME = "zero3 gathers are hidden by the previous layer; ranks wait for each other once per wave of microbatches"
MAX_RANKS = 2048
"""A ring of more ranks takes gigabytes to replay, because the work grows with the square of its degree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One replayed step. Tuples are by rank unless stated otherwise.

    ``low_s``, ``high_s``: the step time with all operations at the fast or all at the slow end of their spread. For
    each rank ``compute_s + exposed_communication_s + exposed_swap_s + idle_s = step_s``, including what happens once
    per step (gather, reduce, optimizer). ``node_nic_share``: fraction of the step in which a node's NICs send, by node.
    ``host_bytes``: bytes of the rank in host memory. ``sent_bytes``, ``received_bytes``: of each of its devices.
    ``mfu``: model FLOPs (from the sum of squared document lengths, without recompute) over peak.
    """

    step_s: float
    low_s: float
    high_s: float
    compute_s: tuple[float, ...]
    exposed_communication_s: tuple[float, ...]
    exposed_swap_s: tuple[float, ...]
    idle_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    node_nic_share: tuple[float, ...]
    model_flop: float
    mfu: float
    lanes: tuple[LaneEvent, ...] = ()

    def mean_s(self, part: str) -> float:
        """Mean over the ranks of one of the four parts of their seconds."""
        values: tuple[float, ...] = getattr(self, part)
        return sum(values) / len(values)


_ROUND_S, _MESSAGE_S, _WRITTEN_S = 1e-3, 1.2e-6, 1e-4
"""Seconds that replaying takes on one core: per round of a wave's groups of one shape; per rank and round of a group
with a closed form; the same with written schedules."""


def estimated_s(plan: StepPlan) -> float:
    """About how long ``replay_step`` takes, from the plan alone, so that no clock decides what a command shows."""
    seconds = 0.0
    for microbatches in split_waves(plan.microbatches):
        num_rounds = {}
        for group in (group for microbatch in microbatches for group in microbatch.groups):
            rounds = group.degree // head_degree(group.kind, group.degree, group.inner_degree)
            num_rounds[group.kind, group.degree, group.inner_degree] = rounds
            seconds += group.degree * rounds * (_MESSAGE_S if has_closed_form(group.kind) else _WRITTEN_S)
        seconds += _ROUND_S * sum(num_rounds.values())
    return seconds


def replay_step(
    plan: StepPlan, cluster: ClusterSpec, model: ModelSpec, memory: MemoryFit, *, tensor_parallel: int = 1,
    element_bytes: int = 2, curves: Curves | None = None, draw: bool = False,
) -> Replay:
    """Replay a legal plan (see ``planner.pricing.verify``). Data rank r is device r * tensor_parallel and the
    following. Raises SpecError for a plan with pipeline stages.

    ``memory``: bytes of a device, as in the plan's cost model. ``element_bytes``: per element of activations and
    gathered weights. ``draw``: keep lanes for a trace.
    """
    _refuse_stages(plan)
    data_ranks = DataRanks(
        machine=machine_model(cluster, curves or load_curves()), model=model, num_ranks=plan.num_ranks,
        tensor_parallel=tensor_parallel, element_bytes=element_bytes,
    )
    lengths = step_lengths(plan)
    waves = split_waves(plan.microbatches)
    shapes = tuple((first_pass(each, lengths, data_ranks), wave_shape(each, lengths, data_ranks)) for each in waves)
    runs = {}
    recorder = LaneRecorder(plan.num_ranks) if draw else None
    for end in End:
        is_nominal = end is End.NOMINAL  # of the ends of the band only the step's length is wanted
        runs[end] = _Step(
            data_ranks=replace(data_ranks, machine=data_ranks.machine.at(end)), plan=plan, shapes=shapes, memory=memory,
            splits=is_nominal, recorder=recorder if is_nominal else None,
        )
        runs[end].run()
    step = runs[End.NOMINAL]
    flop = model.model_flop(step_lengths(plan))
    peak_flop_per_s = plan.num_ranks * tensor_parallel * cluster.device.peak_flop_per_s
    return Replay(
        step_s=step.step_s, low_s=runs[End.FAST].step_s, high_s=runs[End.SLOW].step_s,
        compute_s=_floats(step.total.compute_s), exposed_communication_s=_floats(step.total.exposed_s),
        exposed_swap_s=_floats(step.total.swap_s), idle_s=_floats(step.total.idle_s),
        peak_bytes=_counts(step.peak_bytes), host_bytes=_counts(step.host_bytes), sent_bytes=_counts(step.sent_bytes),
        received_bytes=_counts(step.received_bytes), node_nic_share=_floats(step.nic_share()), model_flop=flop,
        mfu=flop / (step.step_s * peak_flop_per_s), lanes=recorder.events() if recorder is not None else (),
    )


def _refuse_stages(plan: StepPlan) -> None:
    num_stages = getattr(plan, "num_stages", 1)
    if num_stages > 1:
        raise SpecError(f"step {plan.step}: a plan of {num_stages} pipeline stages cannot be replayed")


@dataclass(slots=True)
class _Step:
    """One replay in progress on a machine at one end of its spread. ``splits``: separate waiting from communication."""

    data_ranks: DataRanks
    plan: StepPlan
    shapes: tuple[tuple[WaveShape | None, WaveShape], ...]
    memory: MemoryFit
    splits: bool
    recorder: LaneRecorder | None
    step_s: float = 0.0
    clock: FloatArray = field(init=False)
    total: TimeLedger = field(init=False)
    peak_bytes: FloatArray = field(init=False)
    host_bytes: FloatArray = field(init=False)
    sent_bytes: FloatArray = field(init=False)
    received_bytes: FloatArray = field(init=False)
    far_bytes: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        num_ranks = self.plan.num_ranks
        self.clock, self.total = np.zeros(num_ranks), TimeLedger.empty(num_ranks)
        self.peak_bytes = np.full(num_ranks, float(self.memory.fixed_bytes))
        self.host_bytes, self.sent_bytes, self.received_bytes, self.far_bytes = (np.zeros(num_ranks) for _ in range(4))

    def run(self) -> None:
        params = self.data_ranks.model.num_params / self.data_ranks.tensor_parallel
        gathers_once = self.plan.sharding is Sharding.GATHER_ONCE
        if gathers_once:
            self._collective("gather of the parameters", params * self.data_ranks.element_bytes)
        for before, shape in self.shapes:
            if before is not None:
                self._first_pass(before.priced(self.data_ranks))
            self._wave(shape.priced(self.data_ranks))
        self._wait_for_all()
        if gathers_once:
            self._collective("reduction of the gradients", params * GRADIENT_BYTES)
        optimizer_s = OPTIMIZER_PASS_BYTES * params / self.plan.num_ranks / (
            self.data_ranks.machine.cluster.device.memory_bytes_per_s
        )
        self._everyone("compute", "optimizer", optimizer_s)
        self.total.compute_s += optimizer_s
        self.step_s = float(self.clock.max())

    def nic_share(self) -> FloatArray:
        """Fraction of the step in which the NICs of each node send, averaged over its NICs."""
        data_ranks, cluster = self.data_ranks, self.data_ranks.machine.cluster
        nodes = data_ranks.node_of(np.arange(self.plan.num_ranks))
        nics = min(cluster.nics_per_node, cluster.devices_per_node)
        sent = np.bincount(nodes, weights=self.far_bytes * data_ranks.tensor_parallel)
        return np.asarray(sent / (nics * data_ranks.machine.nic_bytes_per_s * self.step_s), dtype=np.float64)

    def _first_pass(self, wave: Wave) -> None:
        """The first forward of microbatches in chunks, which only stores K/V and has no output head."""
        forward = layers(wave, self.data_ranks)[0]
        self._count_messages(wave, backward=False)
        free = layers(free_links(wave), self.data_ranks, is_free=True)[0] if self.splits else None
        pace_s = self._phase(wave, forward, free, "first forward")
        if self.plan.sharding is Sharding.ZERO3:
            self._gather_by_layer(pace_s, None, int(wave.num_chunks.max()))

    def _wave(self, wave: Wave) -> None:
        forward, backward, head_s = layers(wave, self.data_ranks)
        if self.data_ranks.shares_nics and wave.has_exchanges:
            wave = contended(wave, self.data_ranks, windows(wave, self.clock, forward, backward))
            forward, backward, head_s = layers(wave, self.data_ranks)
        self._account(wave)
        free = layers(free_links(wave), self.data_ranks, is_free=True) if self.splits else None
        pace_s = self._phase(wave, forward, free[0] if free else None, "forward")
        if self.recorder is not None:
            ranks = wave.ranks
            self.recorder("compute", "output head", ranks, self.clock[ranks], (self.clock + head_s)[ranks])
        self.clock += head_s
        self.total.compute_s += head_s
        back_pace_s = self._phase(wave, backward, free[1] if free else None, "backward")
        if self.plan.sharding is Sharding.ZERO3:
            self._gather_by_layer(pace_s, back_pace_s, int(wave.num_chunks.max()))

    def _phase(self, wave: Wave, layer: Layer, free: Layer | None, name: str) -> float:
        """All layers of one direction. Returns the slowest part's seconds per layer.

        A rank may wait for a rank that is late only because of a message. With links that take no time it would wait
        only for the work of others, so any waiting beyond that counts as communication.
        """
        unhindered = self.clock.copy()
        spent, pace_s = all_layers(wave, layer, self.clock, self.data_ranks.model.num_layers, name, self.recorder)
        if free is not None and wave.has_exchanges:
            idle_s = all_layers(wave, free, unhindered, self.data_ranks.model.num_layers, name, None)[0].idle_s
            caused_s = np.maximum(0.0, spent.idle_s - idle_s)
            spent.idle_s -= caused_s
            spent.exposed_s += caused_s
        self.total.add(spent)
        return pace_s

    def _gather_by_layer(self, pace_s: float, back_pace_s: float | None, num_chunks: int) -> None:
        """zero3: weights are gathered for the forward and, if there is one, for the backward, and gradients are
        reduced, each while the previous layer runs; what takes longer than the layer is exposed. All of it happens once
        per chunk. Every rank waits for the slowest microbatch."""
        data_ranks = self.data_ranks
        params = data_ranks.model.num_params / data_ranks.tensor_parallel / data_ranks.model.num_layers
        gather_s = self._collective_s(params * data_ranks.element_bytes)
        reduce_s = self._collective_s(params * GRADIENT_BYTES)
        self._wait_for_all()
        over_s, sent_bytes = max(0.0, gather_s - pace_s / num_chunks), data_ranks.element_bytes
        if back_pace_s is not None:
            over_s += max(0.0, gather_s + reduce_s - back_pace_s / num_chunks)
            sent_bytes += data_ranks.element_bytes + GRADIENT_BYTES
        exposed_s = num_chunks * (gather_s + data_ranks.model.num_layers * over_s)
        self._count_collective(num_chunks * data_ranks.model.num_layers * params * sent_bytes)
        self._everyone("exchange", "zero3 gathers not hidden", exposed_s)
        self.total.exposed_s += exposed_s

    def _collective(self, name: str, num_bytes: float) -> None:
        """Ring all-gather or reduce-scatter of so many bytes per device over all ranks, layer by layer."""
        num_layers = self.data_ranks.model.num_layers
        seconds = num_layers * self._collective_s(num_bytes / num_layers)
        self._count_collective(num_bytes)
        self._everyone("exchange", name, seconds)
        self.total.exposed_s += seconds

    def _collective_s(self, num_bytes: float) -> float:
        """Across nodes a ring crosses each node boundary once, using all NICs (see ``planner.cost.data_sheet``)."""
        data_ranks, machine, ranks = self.data_ranks, self.data_ranks.machine, self.plan.num_ranks
        if ranks == 1:
            return 0.0
        rate = machine.intra_node.bytes_per_s
        if ranks > data_ranks.ranks_per_node:
            rate = min(rate, machine.inter_node.bytes_per_s * data_ranks.ranks_per_node)
        return machine.collective_latency_s(ranks, data_ranks.ranks_per_node) + (ranks - 1) / ranks * num_bytes / rate

    def _count_collective(self, num_bytes: float) -> None:
        """Each rank sends and receives all but its own part; one rank of each node sends to the next node."""
        data_ranks, ranks = self.data_ranks, self.plan.num_ranks
        passed = (ranks - 1) / ranks * num_bytes
        self.sent_bytes += passed
        self.received_bytes += passed
        if ranks > data_ranks.ranks_per_node:
            self.far_bytes += passed / data_ranks.ranks_per_node

    def _everyone(self, lane: str, name: str, seconds: float) -> None:
        if self.recorder is not None and seconds > 0:
            self.recorder(lane, name, np.arange(len(self.clock)), self.clock, self.clock + seconds)
        self.clock += seconds

    def _wait_for_all(self) -> None:
        self.total.idle_s += self.clock.max() - self.clock
        self.clock[:] = self.clock.max()

    def _account(self, wave: Wave) -> None:
        """Add the bytes sent in a wave, and the most memory it holds, which is at the end of the forward."""
        self._count_messages(wave, backward=True)
        data_ranks, model = self.data_ranks, self.data_ranks.model
        away = max(0, model.num_layers - KEPT_LAYERS) / model.num_layers
        gone = away * (wave.swap_fraction + wave.recompute_fraction)
        activations = self.memory.bytes_per_token * wave.chunk_tokens
        keys_bytes = 2 * data_ranks.kv_heads * model.head_dim * (data_ranks.element_bytes + GRADIENT_BYTES)
        stored = np.where(wave.num_chunks > 1, model.num_layers * keys_bytes * wave.rank_tokens, 0.0)
        self.peak_bytes = np.maximum(self.peak_bytes, self.memory.fixed_bytes + activations * (1 - gone) + stored)
        self.host_bytes = np.maximum(
            self.host_bytes, self.data_ranks.tensor_parallel * activations * away * wave.swap_fraction
        )

    def _count_messages(self, wave: Wave, *, backward: bool) -> None:
        num_layers = self.data_ranks.model.num_layers
        for run in wave.runs:
            for flow in (run.forward_traffic, run.backward_traffic)[: 1 + backward]:
                np.add.at(self.sent_bytes, run.ranks, num_layers * (flow.far_sent + flow.near_sent))
                np.add.at(self.received_bytes, run.ranks, num_layers * (flow.far_received + flow.near_received))
                np.add.at(self.far_bytes, run.ranks, num_layers * flow.far_sent)


def _floats(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _counts(values: FloatArray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
