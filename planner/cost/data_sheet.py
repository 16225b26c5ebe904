"""A cost model derived from data sheets, without measurements. Its provenance notes every approximation.

It is good enough to compare plans and to plan for a cluster one does not have; ``longhaul calibrate`` measures a real
one. The formulas have the form of FlexSP's (arXiv 2412.01523, eq. 11-14); FLOPs and saved bytes come from
``planner.inputs.model``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit, MemoryFit, Provenance, RemapFit, TimeFit
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.inputs.cluster import ClusterSpec
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind, Sharding
from planner.schedules.exchange import AttentionSchedule, GroupLimits, schedule_of
from planner.schedules.wire_price import WireSetting

MASTER_BYTES = 4  # fp32 weights that the optimizer updates
ADAM_BYTES = 8  # two fp32 moments
GRADIENT_BYTES = 4  # gradients are summed and reduced in fp32
OPTIMIZER_PASS_BYTES = 28  # AdamW reads weight, gradient, two moments and writes all but the gradient: 7 fp32 values
LAYER_LAUNCH_S = 2.5e-4  # a guess: one layer launches about 60 kernels, forward and backward, at 4 us each
ZERO3_EXPOSED_SHARE = 1 / 3  # a guess: prefetching hides the rest. It gives FlexSP's released beta1 within 3 %
HIDDEN_SHARE = 2 / 7  # the forward's share of attention time: flash attention's backward takes 2.5 forwards
FORWARD_SHARE = 1 / 3  # the forward's share of matrix products: the backward has two for each
HOST_SHARE = 0.75  # share of the host's memory for swapped activations; system, data and staging have the rest
NUM_REMAPS = 4  # exchanges of a layer: to attention and back, forward and backward
MAX_DEGREE = 64
"""Ulysses is priced up to this degree (and at all ranks); of other kinds every degree up to it is priced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelOnCluster(WireSetting):
    """What every formula below needs. A data rank is ``tensor_parallel`` adjacent devices on each pipeline stage.
    ``model`` is the part of the model on the stage with the most layers."""

    num_ranks: int
    num_stages: int

    @property
    def params(self) -> float:
        """Parameters of one device before sharding over the data ranks. With several stages, none has both the
        embedding and the head."""
        model = self.model
        elsewhere = model.vocab_size * model.hidden_dim if self.num_stages > 1 and not model.tied_head else 0
        return (model.num_params - elsewhere) / self.tensor_parallel

    @property
    def group_limits(self) -> GroupLimits:
        return GroupLimits(num_heads=self.query_heads, node_size=min(self.ranks_per_node, self.num_ranks))


def derive_cost(
    cluster: ClusterSpec,
    model: ModelSpec,
    *,
    num_ranks: int,
    tensor_parallel: int = 1,
    num_stages: int = 1,
    element_bytes: int = 2,
    sharding: Sharding = Sharding.GATHER_ONCE,
) -> CostModel:
    """Coefficients for ``num_ranks`` data ranks.

    Priced are local attention, ulysses at powers of two and at ``num_ranks``, and every other kind at each degree up to
    ``MAX_DEGREE`` and at 32 degrees an octave beyond it. ``num_stages``: pipeline stages; the coefficients are then
    those of one stage, with the most layers and the head. ``element_bytes``: bytes of an element of activations and
    gathered weights.

    Raises SpecError where the ranks do not fit the cluster, tensor parallelism does not divide the heads, there are
    more stages than layers, or stages are asked for with zero3.
    """
    _check_grid(cluster, model, num_ranks, tensor_parallel, num_stages)
    placed = _ModelOnCluster(
        cluster=cluster, model=replace(model, num_layers=-(-model.num_layers // num_stages)), num_ranks=num_ranks,
        tensor_parallel=tensor_parallel, num_stages=num_stages, element_bytes=element_bytes,
    )
    fixed_s = placed.model.num_layers * LAYER_LAUNCH_S
    fixed_s += _zero3_s(placed) if sharding is Sharding.ZERO3 else _hand_over(placed)[1]
    kinds = ((kind, _priced_degrees(schedule_of(kind), placed)) for kind in AttentionKind)
    return CostModel(
        times=tuple(_fit(placed, kind, degree, fixed_s) for kind, degrees in kinds for degree in degrees),
        memory=_memory(placed, sharding),
        step_fixed_s=_step_fixed_s(placed, sharding),
        peak_flop_per_s=cluster.device.peak_flop_per_s * tensor_parallel,
        provenance=Provenance(
            source="derived", cluster=cluster.name, model=model.name, notes=_notes(placed, sharding)
        ),
        sharding=sharding,
        activation=_activation(placed),
        chunks=_chunks(placed, fixed_s) if num_stages == 1 else None,
        remap=_remap(placed) if num_stages == 1 else None,
        num_stages=num_stages,
    )


def _check_grid(
    cluster: ClusterSpec, model: ModelSpec, num_ranks: int, tensor_parallel: int, num_stages: int
) -> None:
    devices = num_ranks * tensor_parallel * num_stages
    if min(num_ranks, tensor_parallel, num_stages) < 1 or devices > cluster.num_ranks:
        stages = f" x {num_stages} pipeline stages" if num_stages != 1 else ""
        raise SpecError(
            f"{num_ranks} data ranks x {tensor_parallel} tensor-parallel{stages} do not fit cluster {cluster.name} "
            f"of {cluster.num_ranks} devices"
        )
    if num_stages > model.num_layers:
        raise SpecError(f"model {model.name}: {num_stages} pipeline stages are more than its {model.num_layers} layers")
    if model.num_query_heads % tensor_parallel:
        raise SpecError(
            f"model {model.name}: {model.num_query_heads} query heads cannot be split over {tensor_parallel} "
            "tensor-parallel ranks"
        )


def host_budget_bytes(cluster: ClusterSpec) -> int:
    """Bytes of its node's memory that one device may use for swapped activations."""
    return int(HOST_SHARE * cluster.host.memory_bytes / cluster.devices_per_node)


def _priced_degrees(schedule: AttentionSchedule, placed: _ModelOnCluster) -> list[int]:
    """The degrees to price, of those that the kind can run. A kind that runs at any degree: all up to ``MAX_DEGREE``
    and 32 an octave beyond it (steps of 1.6 to 3.1 %). Another kind: powers of two up to it. Both: all ranks."""
    num_ranks = placed.num_ranks
    if schedule.any_degree:
        degrees = list(range(1, min(num_ranks, MAX_DEGREE) + 1))
        while degrees[-1] < num_ranks:
            degrees.append(min(num_ranks, degrees[-1] + 2 ** (degrees[-1].bit_length() - 6)))
    else:
        degrees = sorted({2**power for power in range(MAX_DEGREE.bit_length()) if 2**power <= num_ranks} | {num_ranks})
    return [degree for degree in degrees if schedule.inner_degree(degree, placed.group_limits) is not None]


def _fit(placed: _ModelOnCluster, kind: AttentionKind, degree: int, fixed_s: float) -> TimeFit:
    schedule = schedule_of(kind)
    inner_degree = schedule.inner_degree(degree, placed.group_limits) or 1
    wire = schedule.price(placed, degree, inner_degree)
    return TimeFit(
        kind=kind, degree=degree, s_per_token2=placed.attention_s / degree * wire.attention_factor,
        s_per_token=_linear_s_per_token(placed) / degree + wire.s_per_token, s_per_sequence=0.0,
        fixed_s=fixed_s + wire.fixed_s, inner_degree=inner_degree,
    )


def _linear_s_per_token(placed: _ModelOnCluster) -> float:
    """Seconds per token of everything but attention, the transfer between stages included, on the token's rank."""
    return placed.linear_s + _tensor_parallel_s_per_token(placed) + _hand_over(placed)[0]


def _remap(placed: _ModelOnCluster) -> RemapFit:
    """In each layer q, k and v go to attention and the output comes back; in the backward their gradients do the same.
    None of it overlaps with compute, and a device moves its own heads."""
    token_bytes = 2 * 2 * (placed.query_heads + placed.kv_heads) * placed.head_bytes
    intra, inter = placed.cluster.intra_node, placed.cluster.inter_node
    return RemapFit(
        linear_s_per_token=_linear_s_per_token(placed),
        intra_s_per_token=token_bytes / intra.bytes_per_s,
        inter_s_per_token=token_bytes / inter.bytes_per_s,
        fixed_s=placed.latency_s(placed.num_ranks, NUM_REMAPS),
        node_size=min(placed.ranks_per_node, placed.num_ranks),
    )


def _hand_over(placed: _ModelOnCluster) -> tuple[float, float]:
    """Transfer between stages: seconds per token of a rank, and seconds per microbatch. A stage between two others
    receives and sends hidden states at the same time, and later their gradients, over the slowest link."""
    if placed.num_stages == 1:
        return 0.0, 0.0
    cluster = placed.cluster
    link = cluster.intra_node if cluster.num_nodes == 1 else cluster.inter_node
    return 2 * placed.model.hidden_dim * placed.element_bytes / link.bytes_per_s, 2 * link.latency_s


def _tensor_parallel_s_per_token(placed: _ModelOnCluster) -> float:
    """Seconds per token of a rank for four ring all-reduces of the hidden state in each layer (two forward, two
    backward)."""
    size = placed.tensor_parallel
    if size == 1:
        return 0.0
    inside = size <= placed.cluster.devices_per_node
    link = placed.cluster.intra_node if inside else placed.cluster.inter_node
    wire_bytes = 2 * (size - 1) / size * placed.model.hidden_dim * placed.element_bytes
    return 4 * placed.model.num_layers * wire_bytes / link.bytes_per_s


def _collective_s(placed: _ModelOnCluster, num_bytes: float) -> float:
    """Seconds of a ring all-gather or reduce-scatter of ``num_bytes`` per device over all data ranks."""
    ranks = placed.num_ranks
    return 0.0 if ranks == 1 else (ranks - 1) / ranks * num_bytes / _collective_bytes_per_s(placed)


def _collective_bytes_per_s(placed: _ModelOnCluster) -> float:
    """Bytes per second of a ring over all data ranks. It crosses each node boundary once, over all NICs, which the
    tensor-parallel peers share."""
    cluster = placed.cluster
    if placed.num_ranks <= placed.ranks_per_node:
        return cluster.intra_node.bytes_per_s
    return min(cluster.intra_node.bytes_per_s, cluster.inter_node.bytes_per_s * placed.ranks_per_node)


def _zero3_s(placed: _ModelOnCluster) -> float:
    """Exposed seconds per microbatch: weights are gathered for the forward and again for the backward, and gradients
    are reduced."""
    return ZERO3_EXPOSED_SHARE * _collective_s(placed, placed.params * (2 * placed.element_bytes + GRADIENT_BYTES))


def _step_fixed_s(placed: _ModelOnCluster, sharding: Sharding) -> float:
    optimizer_s = OPTIMIZER_PASS_BYTES * placed.params / placed.num_ranks / placed.cluster.device.memory_bytes_per_s
    if sharding is Sharding.ZERO3:
        return optimizer_s
    return optimizer_s + _collective_s(placed, placed.params * (placed.element_bytes + GRADIENT_BYTES))


def _memory(placed: _ModelOnCluster, sharding: Sharding) -> MemoryFit:
    """A device holds its shards of weights, moments and gradients, the gathered weights with their gradients, and
    activations. Gathered is the whole model under ``gather_once``, and under ``zero3`` two layers: the one in use and
    the one being prefetched."""
    model, params = placed.model, placed.params
    sharded = (MASTER_BYTES + ADAM_BYTES + GRADIENT_BYTES) * params / placed.num_ranks
    gathered = params
    if sharding is Sharding.ZERO3:
        gathered = 2 * max(model.layer_linear_params, model.vocab_size * model.hidden_dim) / placed.tensor_parallel
    if sharding is Sharding.GATHER_ONCE and placed.num_ranks == 1:
        sharded, gathered = (MASTER_BYTES + ADAM_BYTES) * params, params
    token_bytes = model.num_layers * model.saved_bytes_per_token(placed.element_bytes) / placed.tensor_parallel
    return MemoryFit(
        fixed_bytes=int(sharded + gathered * (placed.element_bytes + GRADIENT_BYTES)), bytes_per_token=token_bytes
    )


def _activation(placed: _ModelOnCluster) -> ActivationFit:
    """What swapping and recomputing free (MEMO, arXiv 2407.12117, section 4.1).

    Two layers are always complete on the device: the one in use and the one being prefetched. In the other layers a
    swapped token frees all that it saved. A recomputed token frees all but the layer's input, attention's output and
    its log-sum-exp, and takes the time of the layer's matrix products without the last one of the MLP, whose output no
    backward needs. With pipeline stages the two layers count for every microbatch in flight, and all stages but the
    last one copy and recompute them as well."""
    model, size = placed.model, placed.tensor_parallel
    num_layers = max(model.num_layers - 2, 0)
    num_busy = num_layers if placed.num_stages == 1 else model.num_layers
    saved_bytes = model.saved_bytes_per_token(placed.element_bytes)
    elements = model.hidden_dim + model.num_query_heads * model.head_dim
    needed_bytes = elements * placed.element_bytes + 4 * model.num_query_heads
    weights = model.layer_active_params - model.active_experts * model.hidden_dim * model.ffn_dim
    device = placed.cluster.device
    layer_s = 2 * weights / (device.peak_flop_per_s * device.linear_efficiency) / size
    layer_s += _tensor_parallel_s_per_token(placed) / (4 * model.num_layers)  # one all-reduce of four
    return ActivationFit(
        swap_bytes_per_token=num_layers * saved_bytes / size,
        recompute_bytes_per_token=num_layers * (saved_bytes - needed_bytes) / size,
        recompute_s_per_token=num_busy * layer_s,
        copy_bytes_per_s=placed.cluster.host.copy_bytes_per_s,
        hidden_share=HIDDEN_SHARE,
        host_bytes_per_byte=num_busy / num_layers if num_layers else 1.0,
    )


def _chunks(placed: _ModelOnCluster, fixed_s: float) -> ChunkFit:
    """Prices of chunks from the model's shape.

    Each chunk pays a microbatch's fixed time for its forward and backward, and a third of it for the forward that comes
    first. K/V stay in ``element_bytes`` and their gradients are summed in fp32. Gradients of q, k and v are fp32, one
    layer at a time. Where queries move (``parallel.chunk_exchange``), a device holds q, the output and the output's
    gradient of the whole group twice, packed and unpacked (6 tensors in ``element_bytes``), and partial outputs or dq
    three times in fp32: as computed, as sent and as received."""
    model, element_bytes = placed.model, placed.element_bytes
    query, keys = placed.query_heads * model.head_dim, placed.kv_heads * model.head_dim
    saved_bytes = model.num_layers * model.saved_bytes_per_token(element_bytes) / placed.tensor_parallel
    return ChunkFit(
        resident_bytes_per_token=model.num_layers * 2 * keys * (element_bytes + GRADIENT_BYTES),
        num_kv_heads=placed.kv_heads,
        fixed_bytes=0,
        bytes_per_token=saved_bytes + GRADIENT_BYTES * (query + 4 * keys),
        shared_bytes_per_token=query * (6 * element_bytes + 3 * GRADIENT_BYTES),
        again_attention=HIDDEN_SHARE,
        again_linear=FORWARD_SHARE,
        s_per_chunk=(1 + FORWARD_SHARE) * fixed_s,
    )


def _notes(placed: _ModelOnCluster, sharding: Sharding) -> tuple[str, ...]:
    notes = [
        "FLOPs over data-sheet peak times one efficiency for matrix products and one for attention, at every length",
        "ulysses: all-to-alls not overlapped, groups of consecutive ranks aligned with nodes, no contention",
        "kinds in rounds: one price a token for the K/V transfers that attention may hide, whatever the length: too "
        "low for short sequences, too high for middling ones, at most by a factor of 1.62",
        "all_gather: the K/V of the group that a rank holds, one layer at a time, is not counted in memory",
        "nothing per sequence: fused variable-length kernels",
        f"guess: {LAYER_LAUNCH_S * 1e6:.0f} us of launches per layer and microbatch",
        "remap of tokens for the token-wise layers not overlapped with compute",
        "gradient reduction and parameter gather not overlapped with compute",
        "logits in chunks (not counted), learned positions sharded like weights",
        f"copies to the host, of all layers but two, hide under {HIDDEN_SHARE:.0%} of a microbatch's time, its forward",
        "recomputing takes the time of its matrix products",
        f"guess: {HOST_SHARE:.0%} of the host's memory is there for swapped activations, evenly by device",
    ]
    if placed.num_stages == 1:
        notes.append(
            f"chunks: one more forward, {FORWARD_SHARE:.0%} of matrix products and exchanges and {HIDDEN_SHARE:.0%} of "
            f"attention, and {1 + FORWARD_SHARE:.2f} times a microbatch's launches for each; K/V and fp32 dK/dV stay"
        )
    if placed.model.num_experts > 1:
        notes.append(
            "guess: experts evenly loaded, at the efficiency of dense products, gathered like all weights (no expert "
            "parallelism)"
        )
    if placed.tensor_parallel > 1:
        notes.append("tensor parallel: activations and weights divided evenly, all-reduces not overlapped")
    if placed.num_stages > 1:
        notes.append(
            f"{placed.num_stages} pipeline stages priced alike: {placed.model.num_layers} layers and the head on "
            "each; what they hand to each other is not overlapped; a forward takes a third of a microbatch"
        )
    if sharding is Sharding.ZERO3:
        notes.append(
            f"guess: {ZERO3_EXPOSED_SHARE:.0%} of zero3's gathers exposed, in every microbatch; ranks wait for each "
            "other once a round of microbatches, not once a layer"
        )
    return tuple(notes)
