"""The shape of a decoder, and the FLOPs, parameters and bytes that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Llama-family decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU. No biases.

    With ``num_experts`` > 1 every layer has that many MLPs of ``ffn_dim`` and a router that sends each token to
    ``active_experts`` of them: memory counts all weights, FLOP only the active ones. Only dense models can be trained.
    """

    name: str
    num_layers: int
    hidden_dim: int
    ffn_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tied_head: bool = False
    gated_mlp: bool = True
    learned_positions: int = 0
    num_experts: int = 1
    active_experts: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_dim", "ffn_dim", "num_query_heads", "num_kv_heads", "head_dim", "vocab_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise SpecError(f"model {self.name}: {name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.active_experts <= self.num_experts:
            raise SpecError(
                f"model {self.name}: active_experts ({self.active_experts}) must be at least 1 and at most "
                f"num_experts ({self.num_experts})"
            )
        if self.num_query_heads % self.num_kv_heads:
            raise SpecError(
                f"model {self.name}: num_query_heads ({self.num_query_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise SpecError(f"model {self.name}: head_dim ({self.head_dim}) must be even, because RoPE rotates pairs")

    @property
    def layer_linear_params(self) -> int:
        """Weights of one layer's matrix products: qkv, output projection, router, all experts' MLPs."""
        return self._layer_params(self.num_experts)

    @property
    def layer_active_params(self) -> int:
        """Those weights of ``layer_linear_params`` that process one token."""
        return self._layer_params(self.active_experts)

    def _layer_params(self, num_mlps: int) -> int:
        heads = self.num_query_heads + 2 * self.num_kv_heads
        attention = self.hidden_dim * heads * self.head_dim + self.num_query_heads * self.head_dim * self.hidden_dim
        router = self.hidden_dim * self.num_experts if self.num_experts > 1 else 0
        return attention + router + num_mlps * (3 if self.gated_mlp else 2) * self.hidden_dim * self.ffn_dim

    @property
    def num_params(self) -> int:
        """All parameters, every expert included."""
        return self._all_params(self.layer_linear_params)

    @property
    def num_active_params(self) -> int:
        """Parameters that process one token, by which mixtures of experts are named. All parameters in a dense
        model."""
        return self._all_params(self.layer_active_params)

    def _all_params(self, layer_params: int) -> int:
        norms = self.num_layers * (2 * self.hidden_dim + (2 * self.head_dim if self.qk_norm else 0)) + self.hidden_dim
        embeddings = self.vocab_size * self.hidden_dim * (1 if self.tied_head else 2)
        positions = self.learned_positions * self.hidden_dim
        return self.num_layers * layer_params + norms + embeddings + positions

    def linear_flop(self, num_tokens: int) -> float:
        """Forward plus backward FLOPs of all matrix products with active weights: 6 per weight and token (Kaplan et
        al., arXiv 2001.08361, section 2.1), the output head included, the embedding look-up not."""
        weights = self.num_layers * self.layer_active_params + self.hidden_dim * self.vocab_size
        return 6.0 * weights * num_tokens

    def attention_flop(self, lengths: Iterable[int]) -> float:
        """Forward plus backward FLOPs of causal attention in which documents do not attend to each other.

        Forward: two products (scores, output) of 2 * 2 * (s^2 / 2) * heads * head_dim in each layer. Backward: counted
        as twice the forward (model FLOPs, which do not include the recomputation inside flash attention).
        """
        squares = sum(size * size for size in lengths)
        return 3.0 * 2.0 * squares * self.num_query_heads * self.head_dim * self.num_layers

    def model_flop(self, lengths: Iterable[int]) -> float:
        """Forward plus backward FLOPs of one step over documents of these lengths (tokens)."""
        sizes = tuple(lengths)
        return self.linear_flop(sum(sizes)) + self.attention_flop(sizes)

    def saved_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of activations that autograd saves per token of one layer, without recompute.

        Inputs of both norms and their normalised outputs (4 x hidden); q and attention output (2 x query heads); k
        and v; q and k before RoPE; gate, up, their activation and product (4 x ffn; without a gate only up and its
        activation, 2 x ffn); and the fp32 log-sum-exp. A mixture saves the MLP's part for each active expert, with that
        expert's copy of the token before and after it (2 x hidden).
        """
        query = self.num_query_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        mlp = (4 if self.gated_mlp else 2) * self.ffn_dim + (2 * self.hidden_dim if self.num_experts > 1 else 0)
        elements = 4 * self.hidden_dim + 3 * query + 3 * kv + self.active_experts * mlp
        return elements * element_bytes + 4 * self.num_query_heads
