"""MEMO's 7B step at 1M tokens on 8 devices, and what its host memory can take.

A layer's kept activations are 16 hidden vectors a token: input and attention output are always swapped to the host,
of the other 14 a share that the copy hides behind the next layer's forward and that host memory holds; the rest is
recomputed, which costs the products of QKV, attention output and the first of the MLP (16 h^2 FLOP a token). The last
two layers are never swapped (section 4). Kernel rates come from another paper on the same die, so that MFU is
predicted, not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.inputs.model import ModelSpec
from planner.reproduce.table import Reproduction, Row, Rule, load_data
from planner.units import GIB, KIB, parse_rate

SWAPPED_ALWAYS = 2  # hidden vectors of a token and layer
SWAPPED_OPTIONAL = 14
ELEMENT_BYTES = 2
LAYERS_NOT_SWAPPED = 2
STEP = Rule(name="step", below=0.10, above=0.10)
SIZES = Rule(name="activation sizes", below=0.01, above=0.01)
HOST = Rule(name="host-memory limits, two digits", below=0.05, above=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoModel:
    """A GPT of table 2: full multi-head attention, MLP of four times the hidden size."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    vocab_size: int

    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="memo-7b", num_layers=self.num_layers, hidden_dim=self.hidden_dim, ffn_dim=4 * self.hidden_dim,
            num_query_heads=self.num_heads, num_kv_heads=self.num_heads, head_dim=self.hidden_dim // self.num_heads,
            vocab_size=self.vocab_size, gated_mlp=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShare:
    """Flash attention's share of a layer's forward time at this many tokens."""

    tokens: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedRates:
    """FlexSP's coefficients of one model on an A100: what gives FLOP/s of attention and of matrix products."""

    num_layers: int
    hidden_dim: int
    ms_per_token2: float
    ms_per_token: float
    params_2_30: float
    all_to_all_per_s: str
    nvlink_share: float

    @property
    def attention_flop_per_s(self) -> float:
        """Causal model FLOPs: 6 a token^2, hidden element and layer, forward and backward."""
        return 6 * self.num_layers * self.hidden_dim / (self.ms_per_token2 * 1e-3)

    @property
    def linear_flop_per_s(self) -> float:
        return 6 * self.params_2_30 * GIB / (self.ms_per_token * 1e-3)

    @property
    def all_to_all_bytes_per_s(self) -> float:
        return parse_rate(self.all_to_all_per_s) * self.nvlink_share


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimit:
    """Largest share of the optional activations that fits the hosts (2 TiB for every 8 devices)."""

    model: str
    num_layers: int
    hidden_dim: int
    num_devices: int
    thousand_tokens: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoData:
    """``data/memo.yaml``."""

    source: str
    model: MemoModel
    num_devices: int
    host_gib: int
    peak_flop_per_s: str
    long_tokens: int
    mfu: float
    skeletal_gib: float
    attention_share: AttentionShare
    overlap_tokens: int
    a100: ReleasedRates
    host_limits: tuple[HostLimit, ...]


def reproduce_memo() -> Reproduction:
    """Takes no time: closed forms only."""
    data = load_data(MemoData, "memo")
    share = data.attention_share
    attention_s, linear_s = layer_forward_s(data, share.tokens)
    kept_bytes = (SWAPPED_ALWAYS + SWAPPED_OPTIONAL) * token_layer_bytes(data.model.hidden_dim)
    skeletal_gib = kept_bytes * data.model.num_layers * data.long_tokens / GIB
    rows = [
        Row(name="7B, 1M tokens, 8 devices: MFU", paper=data.mfu, ours=predicted_mfu(data), rule=STEP),
        Row(name="attention share of a layer's forward at 576K (paper: above)", paper=share.share,
            ours=attention_s / (attention_s + linear_s), rule=STEP),
        Row(name="kept activations at 1M tokens, GiB", paper=data.skeletal_gib, ours=skeletal_gib, rule=SIZES),
    ]
    for limit in data.host_limits:
        ours = host_share(
            num_layers=limit.num_layers, hidden_dim=limit.hidden_dim, num_tokens=limit.thousand_tokens * KIB,
            host_bytes=data.host_gib * GIB * limit.num_devices // 8,
        )
        name = f"{limit.model}, {limit.thousand_tokens}K, {limit.num_devices} devices: share the hosts hold"
        rows.append(Row(name=name, paper=limit.share, ours=ours, rule=HOST))
    return Reproduction(system="memo", title=data.source, rows=tuple(rows), assumptions=_ASSUMPTIONS)


def token_layer_bytes(hidden_dim: int) -> int:
    """Bytes of one hidden vector."""
    return ELEMENT_BYTES * hidden_dim


def host_share(*, num_layers: int, hidden_dim: int, num_tokens: int, host_bytes: int) -> float:
    """The share of optional activations (0 .. 1, or negative where not even the others fit) that host memory takes."""
    vectors = host_bytes / ((num_layers - LAYERS_NOT_SWAPPED) * num_tokens * token_layer_bytes(hidden_dim))
    return min(1.0, (vectors - SWAPPED_ALWAYS) / SWAPPED_OPTIONAL)


def layer_forward_s(data: MemoData, num_tokens: int) -> tuple[float, float]:
    """Seconds of one layer's attention and of its matrix products, forward, all devices at work."""
    hidden_dim = data.model.hidden_dim
    attention_flop = 2 * hidden_dim * num_tokens**2
    linear_flop = 2 * 12 * hidden_dim**2 * num_tokens
    return (
        attention_flop / (data.a100.attention_flop_per_s * data.num_devices),
        linear_flop / (data.a100.linear_flop_per_s * data.num_devices),
    )


def overlap_share(data: MemoData, num_tokens: int) -> float:
    """The share of optional activations whose copy hides behind a layer's forward. The copy rate is the one that hides
    everything from the published length on."""
    layer_bytes = token_layer_bytes(data.model.hidden_dim) / data.num_devices
    vectors_bytes = (SWAPPED_ALWAYS + SWAPPED_OPTIONAL) * layer_bytes * data.overlap_tokens
    copy_bytes_per_s = vectors_bytes / sum(layer_forward_s(data, data.overlap_tokens))
    hidden_vectors = copy_bytes_per_s * sum(layer_forward_s(data, num_tokens)) / (layer_bytes * num_tokens)
    return min(1.0, (hidden_vectors - SWAPPED_ALWAYS) / SWAPPED_OPTIONAL)


def predicted_mfu(data: MemoData) -> float:
    """Model FLOPs (causal) over peak FLOPs of the predicted step."""
    model, rates, num_tokens = data.model.spec(), data.a100, data.long_tokens
    share = min(overlap_share(data, num_tokens), host_share(
        num_layers=model.num_layers, hidden_dim=model.hidden_dim, num_tokens=num_tokens,
        host_bytes=data.host_gib * GIB,
    ))
    if share < 0:
        raise ValueError(f"{num_tokens} tokens: not even what is always swapped can be")
    recompute_flop = (1 - share) * 16 * model.hidden_dim**2 * num_tokens * model.num_layers
    linear_s = (model.linear_flop(num_tokens) + recompute_flop) / rates.linear_flop_per_s
    attention_s = model.attention_flop((num_tokens,)) / rates.attention_flop_per_s
    exchanged_bytes = 4 * 2 * model.num_layers * token_layer_bytes(model.hidden_dim) * num_tokens
    step_s = (linear_s + attention_s + exchanged_bytes / rates.all_to_all_bytes_per_s) / data.num_devices
    return model.model_flop((num_tokens,)) / (step_s * data.num_devices * parse_rate(data.peak_flop_per_s))


_ASSUMPTIONS = (
    "guess: MFU counts causal attention (6 s^2 h a layer); the paper's formula could not be read",
    "rates of attention and of matrix products: FlexSP's released GPT-7B coefficients on an A100 (heads of 64)",
    "guess: eight-way sequence parallelism with all-to-alls, at the A100's rate cut to the A800's NVLink share",
    "copy rate: the one that hides a layer's copy from the published 192K on; at 1M the host binds, not the copy",
    "optimizer and gradient reduction not counted (below 0.1 % of a step of 12 minutes)",
    "host limits: the paper's constraint, 2 TiB for 8 devices, no reserve; the shares are not printed in the paper but "
    "worked out by hand, so these rows check arithmetic only; 13B on 16 and 30B on 32 devices is a guess",
    "no row: the paper's 128 GB for the layer inputs at 1M contradicts its own sizes, which give 256 GiB",
)
