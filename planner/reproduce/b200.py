"""Measured Megatron-LM steps on 8 B200: seconds and peak bytes from the machine's measured kernel efficiencies.

A microbatch is its matrix products and attention at the efficiency measured for their shape, its passes over memory,
and its collectives: with tensor parallel an all-gather before and a reduce-scatter after each half of a layer, the same
in the backward and the halves' inputs gathered once more for the weight gradients; with context parallel the
all-to-alls of q, k, v and output, both ways. A step adds the pipeline's filling, the reduction of gradients, the
optimizer and the gather of weights. Everything is one after the other, nothing overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.inputs.model import ModelSpec
from planner.reproduce.table import Reproduction, Row, Rule, load_data
from planner.units import GIB, MICROSECONDS_PER_S, parse_rate

TIME = Rule(name="step time", below=0.12, above=0.12, mean=0.05)
FITTED_TIME = Rule(name="step time, rows that the slowdown is fitted on", below=0.12, above=0.12)
MEMORY = Rule(name="peak memory", below=0.0, above=0.05)
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12  # weights and gradients whole, fp32 copy and moments sharded
OPTIMIZER_PASS_BYTES = 30  # reads gradient, copy and moments, writes copy, moments and the bf16 weight
LOSS_PASSES = 3  # over the bf16 logits: read twice in the forward, gradient written in place of them
LOGIT_BYTES = 4  # bf16 logits and their gradient
WORKSPACE_GIB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The decoder."""

    num_layers: int
    hidden_dim: int
    ffn_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def qkv_dim(self) -> int:
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_params(self) -> int:
        model = ModelSpec(
            name="b200", num_layers=1, hidden_dim=self.hidden_dim, ffn_dim=self.ffn_dim,
            num_query_heads=self.num_query_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            vocab_size=self.vocab_size,
        )
        return model.layer_linear_params


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """Share of the link's rate, microseconds for each other rank and for the call by ranks ("0": any number)."""

    efficiency: float
    latency_us: float
    call_us: dict[str, float]

    def latency_s(self, num_ranks: int) -> float:
        call_us = self.call_us.get(str(num_ranks), self.call_us.get("0", 0.0))
        return (self.latency_us * (num_ranks - 1) + call_us) / MICROSECONDS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul:
    """Measured shares of peak of one linear layer's three products."""

    tokens: int
    inputs: int
    outputs: int
    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    tokens: int
    heads: int
    forward: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measured run. Ranks: tensor x context x pipeline x data = 8."""

    tensor: int
    context: int
    pipeline: int
    data: int
    sequence_tokens: int
    microbatches: int
    step_ms: float
    peak_gib: float

    @property
    def rank_tokens(self) -> int:
        """Tokens of a microbatch in a tensor-parallel group."""
        return self.sequence_tokens // self.context

    @property
    def name(self) -> str:
        return (
            f"tp{self.tensor} cp{self.context} pp{self.pipeline} dp{self.data}, {self.microbatches} x "
            f"{self.sequence_tokens}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class B200Data:
    """``data/b200.yaml``."""

    source: str
    model: Shape
    peak_flop_per_s: str
    default_matmul: float
    memory_gib_per_s: float
    memory_efficiency: float
    loss_efficiency: float
    kernel_latency_us: float
    link_gib_per_s: float
    collectives: dict[str, Collective]
    kernel_slowdown: float
    matmuls: tuple[Matmul, ...]
    attentions: tuple[Attention, ...]
    steps: tuple[Step, ...]


def reproduce_b200() -> Reproduction:
    """Time (ms) and memory (GiB) of every measured step."""
    data = load_data(B200Data, "b200")
    rows = [
        Row(
            name=f"{step.name}: ms", paper=step.step_ms, ours=step_s(data, step) * 1000,
            rule=FITTED_TIME if step.tensor * step.context == 1 else TIME,
        )
        for step in data.steps
    ]
    rows += [
        Row(name=f"{step.name}: GiB", paper=step.peak_gib, ours=peak_bytes(data, step) / GIB, rule=MEMORY)
        for step in data.steps
    ]
    return Reproduction(system="b200", title=data.source, rows=tuple(rows), assumptions=_ASSUMPTIONS)


def step_s(data: B200Data, step: Step) -> float:
    """Seconds of a step; of a pipeline, 1F1B: every stage once and the slowest again for each further microbatch."""
    model = data.model
    layers_s = model.num_layers // step.pipeline * layer_s(data, step)
    first_s, last_s = layers_s + embedding_s(data, step), layers_s + head_s(data, step)
    if step.pipeline == 1:
        stages_s = [first_s + last_s - layers_s]
    else:
        stages_s = [first_s, *[layers_s] * (step.pipeline - 2), last_s]
    hop_bytes = 2 * step.rank_tokens * model.hidden_dim / step.tensor
    hops_s = 2 * (step.pipeline - 1) * _collective_s(data, "send", hop_bytes, 2)
    return sum(stages_s) + (step.microbatches - 1) * max(stages_s) + hops_s + update_s(data, step)


def layer_s(data: B200Data, step: Step) -> float:
    """One layer, forward and backward of one microbatch."""
    model, size = data.model, step.tensor
    linears = (
        (model.hidden_dim, model.qkv_dim // size),
        (model.num_query_heads * model.head_dim // size, model.hidden_dim),
        (model.hidden_dim, 2 * model.ffn_dim // size),
        (model.ffn_dim // size, model.hidden_dim),
    )
    seconds = sum(_linear_s(data, step.rank_tokens, inputs, outputs) for inputs, outputs in linears)
    return seconds + _attention_s(data, step) + _passes_s(data, step) + _exchanges_s(data, step)


def embedding_s(data: B200Data, step: Step) -> float:
    """The look-up and its gradient: a vector read and written for each token, both ways, and scattered or gathered."""
    passes_s = 2 * _pass_s(data, 2 * 2 * step.rank_tokens * data.model.hidden_dim)
    return passes_s + _tensor_s(data, step, num_gathers=1, num_scatters=1)


def head_s(data: B200Data, step: Step) -> float:
    """Output product and fused cross-entropy over this rank's part of the vocabulary."""
    outputs = data.model.vocab_size // step.tensor
    logit_bytes = 2 * step.rank_tokens * outputs
    loss_s = LOSS_PASSES * logit_bytes / (data.memory_gib_per_s * GIB * data.loss_efficiency)
    loss_s += 2 * data.kernel_latency_us / MICROSECONDS_PER_S
    loss_s += _tensor_s(data, step, num_gathers=2, num_scatters=1)
    return _linear_s(data, step.rank_tokens, data.model.hidden_dim, outputs) + loss_s


def update_s(data: B200Data, step: Step) -> float:
    """Once a step: gradients cleared, reduced and measured, the optimizer, weights gathered; nothing overlapped."""
    params, peers = _rank_params(data.model, step), step.data * step.context
    seconds = _pass_s(data, GRADIENT_BYTES * params)
    seconds += _pass_s(data, (OPTIMIZER_PASS_BYTES + GRADIENT_BYTES) * params / peers)
    seconds += _collective_s(data, "reduce_scatter", GRADIENT_BYTES * params, peers)
    return seconds + _collective_s(data, "all_gather", WEIGHT_BYTES * params, peers)


def peak_bytes(data: B200Data, step: Step) -> float:
    """Of the fullest stage, the first: it keeps one microbatch for each stage behind it and itself.

    A token of a layer keeps, divided over the tensor-parallel ranks: both norms' inputs and outputs, q, k and v,
    attention's output, gate and up, and their product.
    """
    model, size = data.model, step.tensor
    params = _rank_params(model, step)
    states = params * (WEIGHT_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES / (step.data * step.context))
    elements = 4 * model.hidden_dim + model.qkv_dim + model.num_query_heads * model.head_dim + 3 * model.ffn_dim
    num_kept = min(step.pipeline, step.microbatches) * model.num_layers // step.pipeline
    kept = 2 * elements * num_kept * step.rank_tokens / size
    logits = LOGIT_BYTES * step.rank_tokens * model.vocab_size / size if step.pipeline == 1 else 0
    gathered = 2 * 2 * step.rank_tokens * model.hidden_dim
    embedding_gradient = 2 * model.vocab_size * model.hidden_dim / size
    return states + kept + logits + gathered + embedding_gradient + WORKSPACE_GIB * GIB


def _rank_params(model: Shape, step: Step) -> float:
    """Of the first stage: its layers and the embedding, and the output layer where there is one stage."""
    tables = 2 if step.pipeline == 1 else 1
    layers = model.num_layers // step.pipeline * model.layer_params
    return (layers + tables * model.vocab_size * model.hidden_dim) / step.tensor


def _linear_s(data: B200Data, num_tokens: int, inputs: int, outputs: int) -> float:
    """Output, input gradient and weight gradient of one linear layer."""
    shares: tuple[float, ...] = (data.default_matmul,) * 3
    for each in data.matmuls:
        if (each.tokens, each.inputs, each.outputs) == (num_tokens, inputs, outputs):
            shares = (each.forward, each.input_gradient, each.weight_gradient)
    flop_s = 2.0 * num_tokens * inputs * outputs / parse_rate(data.peak_flop_per_s)
    return data.kernel_slowdown * sum(flop_s / share for share in shares)


def _attention_s(data: B200Data, step: Step) -> float:
    """Raises ValueError where the shape was not measured."""
    heads = data.model.num_query_heads // (step.tensor * step.context)
    for each in data.attentions:
        if (each.tokens, each.heads) == (step.sequence_tokens, heads):
            flop_s = 4.0 * step.sequence_tokens**2 * heads * data.model.head_dim / parse_rate(data.peak_flop_per_s)
            return data.kernel_slowdown * flop_s * (1 / each.forward + 2.5 / each.backward)
    raise ValueError(f"attention of {step.sequence_tokens} tokens and {heads} heads was not measured")


def _passes_s(data: B200Data, step: Step) -> float:
    """Norms, residual sums, rotary positions and the gated activation, forward and backward."""
    model = data.model
    hidden_bytes = 2 * step.rank_tokens * model.hidden_dim / step.tensor
    rotary_bytes = 2 * step.rank_tokens * (model.num_query_heads + model.num_kv_heads) * model.head_dim / step.tensor
    ffn_bytes = 2 * step.rank_tokens * model.ffn_dim / step.tensor
    norms_s = 2 * (_pass_s(data, 2 * hidden_bytes) + _pass_s(data, 3 * hidden_bytes))
    sums_s = 4 * _pass_s(data, 3 * hidden_bytes)
    rotary_s = 2 * _pass_s(data, 2 * rotary_bytes)
    return norms_s + sums_s + rotary_s + _pass_s(data, 3 * ffn_bytes) + _pass_s(data, 5 * ffn_bytes)


def _exchanges_s(data: B200Data, step: Step) -> float:
    model = data.model
    head_bytes = 2 * model.head_dim * step.rank_tokens / step.tensor
    query_s = _collective_s(data, "all_to_all", model.num_query_heads * head_bytes, step.context)
    kv_s = _collective_s(data, "all_to_all", model.num_kv_heads * head_bytes, step.context)
    return 4 * query_s + 4 * kv_s + _tensor_s(data, step, num_gathers=6, num_scatters=4)


def _tensor_s(data: B200Data, step: Step, *, num_gathers: int, num_scatters: int) -> float:
    """All-gathers and reduce-scatters of the hidden state among the tensor-parallel ranks."""
    hidden_bytes = 2 * step.rank_tokens * data.model.hidden_dim
    gather_s = _collective_s(data, "all_gather", hidden_bytes, step.tensor)
    return num_gathers * gather_s + num_scatters * _collective_s(data, "reduce_scatter", hidden_bytes, step.tensor)


def _pass_s(data: B200Data, num_bytes: float) -> float:
    rate = data.memory_gib_per_s * GIB * data.memory_efficiency
    return num_bytes / rate + data.kernel_latency_us / MICROSECONDS_PER_S


def _collective_s(data: B200Data, name: str, num_bytes: float, num_ranks: int) -> float:
    """Seconds of a collective over this many bytes in all; each rank keeps its own part. A send has no such part."""
    if num_ranks == 1:
        return 0.0
    collective = data.collectives[name]
    rate = data.link_gib_per_s * GIB * collective.efficiency
    sent_bytes = num_bytes if name == "send" else num_bytes * (num_ranks - 1) / num_ranks
    return sent_bytes / rate + collective.latency_s(num_ranks)


_ASSUMPTIONS = (
    "kernel, memory and link efficiencies: measured, from the same release",
    "rates of memory and links count in GiB, latencies for each other rank, as the release's own simulator reads them",
    "time: one constant is fitted, products and attention take 1.05 times as long in a step as alone. It is from the "
    "three rows of tp1 cp1, which the mean leaves out; without it every row is too fast, by 6.3 % in the mean (a miss)",
    "guess: output products of tensor parallel 4 and 8 at the mean efficiency of all measured products",
    "guess: no collective overlaps with anything, neither tensor parallel's in the backward nor the gradients'; chosen "
    "after hiding the backward's reduce-scatters had missed the tp8 rows by 26 to 29 %, so those rows are not blind",
    f"memory: {WORKSPACE_GIB} GiB of workspace is fitted to these rows (once, for all), and so is the choice to count "
    "the embedding's bf16 gradient and no fp32 logits: the memory rows show that one rule holds all, not a prediction",
)
