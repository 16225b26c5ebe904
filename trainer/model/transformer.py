"""A Llama-family decoder on megatron-core's tensor-parallel layers. Its inputs are tokens, positions and a callable
that computes attention; it knows nothing of data ranks, plans or groups. With pipeline parallelism it is one stage: the
first has the embedding, the last has the final norm, head and loss.

Each layer has three segments: ``before_attention`` (norm, qkv, RoPE; token-wise), ``attention`` (an argument; mixes
tokens and communicates with other ranks) and ``after_attention`` (output projection, residual, norm, MLP; token-wise).
So one layer serves every system. The token-wise segments are chains of steps on a ``memory.tape``, which may swap or
recompute what they save, token by token.
Shapes: T packed tokens on this rank, D hidden, N/K query/KV heads of this tensor rank, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn
from torch.nn import functional

from memory.chunked_loss import VocabShard, chunked_token_loss
from memory.chunked_mlp import chunked_mlp
from memory.tape import Attention, PlainTape, Tape
from memory.token_swap import MicrobatchMemory
from parallel import comm
from parallel.rotary import RotaryTable, inverse_frequencies, rotary_table, rotate
from planner.inputs.model import ModelSpec

STEPS = ("attention_norm", "qkv", "attention_output", "mlp_norm", "gate_up", "swiglu", "down")
"""The token-wise steps of a layer, in order, by which a memory policy may name them. If the MLP runs in pieces, ``mlp``
replaces the last four."""


@dataclass(frozen=True, slots=True)
class TensorShard:
    """This rank's position on the tensor axis."""

    rank: int
    size: int
    group: comm.Group


@dataclass(frozen=True, slots=True)
class StageShard:
    """This rank's pipeline stage."""

    stage: int = 0
    num_stages: int = 1

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this stage; stages differ by at most one layer."""
        return range(num_layers * self.stage // self.num_stages, num_layers * (self.stage + 1) // self.num_stages)


class DecoderLayer(nn.Module):
    """One layer. Fused weights are laid out so that any tensor-parallel slice is a contiguous range of rows: qkv as
    KV-head groups of (queries..., key, value), gate and up interleaved row by row.
    ``mlp_chunk_tokens``: how many rows the MLP processes at a time (0: all)."""

    def __init__(
        self, spec: ModelSpec, config: ModelParallelConfig, tensor: TensorShard, mlp_chunk_tokens: int = 0
    ) -> None:
        super().__init__()
        self.mlp_chunk_tokens = mlp_chunk_tokens
        self.head_dim = spec.head_dim
        self.num_kv_heads = spec.num_kv_heads // tensor.size
        self.queries_per_kv = spec.num_query_heads // spec.num_kv_heads
        qkv_rows = (spec.num_query_heads + 2 * spec.num_kv_heads) * spec.head_dim

        def column(rows: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                spec.hidden_dim, rows, config=config, init_method=None, bias=False, tp_group=tensor.group
            )

        def row(columns: int) -> RowParallelLinear:
            return RowParallelLinear(
                columns, spec.hidden_dim, config=config, init_method=None, bias=False, input_is_parallel=True,
                skip_bias_add=False, tp_group=tensor.group,
            )

        self.attention_norm = nn.RMSNorm(spec.hidden_dim, eps=spec.norm_eps)
        self.qkv = column(qkv_rows)
        self.query_norm = nn.RMSNorm(spec.head_dim, eps=spec.norm_eps) if spec.qk_norm else None
        self.key_norm = nn.RMSNorm(spec.head_dim, eps=spec.norm_eps) if spec.qk_norm else None
        self.out = row(spec.num_query_heads * spec.head_dim)
        self.mlp_norm = nn.RMSNorm(spec.hidden_dim, eps=spec.norm_eps)
        self.gate_up = column(2 * spec.ffn_dim)
        self.down = row(spec.ffn_dim)

    def before_attention(
        self, hidden_TD: torch.Tensor, rotary: RotaryTable, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token-wise: q ``[T, N, H]``, k and v ``[T, K, H]``, RoPE applied."""
        normed_TD = tape.step("attention_norm", self.attention_norm, hidden_TD)
        q, k, v = tape.step("qkv", self._project_qkv, normed_TD, rotary.cos, rotary.sin)
        return q, k, v

    def after_attention(self, hidden_TD: torch.Tensor, context_TNH: torch.Tensor, tape: Tape) -> torch.Tensor:
        """Token-wise: output projection, residual, norm, SwiGLU, residual."""
        hidden_TD = tape.step("attention_output", self._add_attention, hidden_TD, context_TNH)
        output_TD: torch.Tensor
        if self.mlp_chunk_tokens:
            output_TD = tape.step("mlp", self._add_mlp_in_pieces, hidden_TD)
            return output_TD
        normed_TD = tape.step("mlp_norm", self.mlp_norm, hidden_TD)
        gate_up_TF2 = tape.step("gate_up", self._project_gate_up, normed_TD)
        product_TF = tape.step("swiglu", _swiglu, gate_up_TF2)
        output_TD = tape.step("down", self._add_mlp, hidden_TD, product_TF)
        return output_TD

    def forward(
        self, hidden_TD: torch.Tensor, rotary: RotaryTable, attention: Attention, tape: Tape
    ) -> torch.Tensor:
        q, k, v = self.before_attention(hidden_TD, rotary, tape)
        context_TNH = tape.attention(attention, q, k, v)
        return hidden_TD if context_TNH is None else self.after_attention(hidden_TD, context_TNH, tape)

    def _project_qkv(
        self, normed_TD: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = self.queries_per_kv + 2
        packed = self.qkv(normed_TD)[0].unflatten(-1, (self.num_kv_heads, width, self.head_dim))
        q, k, v = packed.split((self.queries_per_kv, 1, 1), dim=2)
        q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, cos_T1H, sin_T1H), rotate(k, cos_T1H, sin_T1H), v

    def _add_attention(self, hidden_TD: torch.Tensor, context_TNH: torch.Tensor) -> torch.Tensor:
        return hidden_TD + self.out(context_TNH.flatten(1))[0]

    def _project_gate_up(self, normed_TD: torch.Tensor) -> torch.Tensor:
        return self.gate_up(normed_TD)[0].unflatten(-1, (-1, 2))

    def _add_mlp(self, hidden_TD: torch.Tensor, product_TF: torch.Tensor) -> torch.Tensor:
        return hidden_TD + self.down(product_TF)[0]

    def _add_mlp_in_pieces(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return chunked_mlp(
            hidden_TD, inner=lambda rows: _swiglu(self._project_gate_up(self.mlp_norm(rows))),
            inner_parameters=(self.mlp_norm.weight, self.gate_up.weight), outer=lambda product: self.down(product)[0],
            outer_weight_DF=self.down.weight, chunk_tokens=self.mlp_chunk_tokens,
        )


def _swiglu(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_TF2.unbind(-1)
    return functional.silu(gate) * up


class Decoder(nn.Module):
    """Embedding, layers, final norm, head and loss, or one stage's part of them. One call runs this rank's part of one
    microbatch. Parameter names do not depend on the number of stages."""

    def __init__(
        self, spec: ModelSpec, tensor: TensorShard, stage: StageShard = StageShard(), *, loss_chunk_tokens: int = 1024,
        mlp_chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.tensor = tensor
        self.stage = stage
        self.loss_chunk_tokens = loss_chunk_tokens
        self.mlp_chunk_tokens = mlp_chunk_tokens
        self.padded_vocab = -(-spec.vocab_size // tensor.size) * tensor.size
        config = ModelParallelConfig(
            tensor_model_parallel_size=tensor.size, use_cpu_initialization=True, perform_initialization=False,
            params_dtype=torch.float32, gradient_accumulation_fusion=False,
        )
        self.embedding = None
        if stage.is_first:
            self.embedding = VocabParallelEmbedding(
                self.padded_vocab, spec.hidden_dim, init_method=None, config=config, tp_group=tensor.group
            )
        self.layers = nn.ModuleDict(
            {
                str(number): DecoderLayer(spec, config, tensor, mlp_chunk_tokens)
                for number in stage.layers(spec.num_layers)
            }
        )
        self.norm = nn.RMSNorm(spec.hidden_dim, eps=spec.norm_eps) if stage.is_last else None
        self.head = None
        if stage.is_last and not spec.tied_head:
            self.head = ColumnParallelLinear(
                spec.hidden_dim, self.padded_vocab, config=config, init_method=None, bias=False, tp_group=tensor.group
            )

    def forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, labels_T: torch.Tensor | None, attention: Attention,
        hidden_TD: torch.Tensor | None = None, memory: MicrobatchMemory | None = None,
    ) -> torch.Tensor:
        """Sum of the losses of this rank's tokens (scalar, fp32 or wider). ``labels_T`` may hold IGNORE; if it is None,
        hidden states are returned instead.

        ``hidden_TD``: what the previous stage returned; a stage that is not the last returns hidden states ``[T, D]``.
        ``memory``: decides what happens to the layers' saved activations (None: they are kept).
        """
        if hidden_TD is None:
            assert self.embedding is not None, "only the first stage starts from tokens"
            hidden_TD = self.embedding(tokens_T)
        rotary = rotary_table(
            positions_T, inverse_frequencies(self.spec.head_dim, self.spec.rope_theta), hidden_TD.dtype
        )
        for place, layer in enumerate(self.layers.values()):
            tape = PlainTape() if memory is None else memory.tape(place, layer.parameters())
            hidden_TD = layer(hidden_TD, rotary, attention, tape)
            if memory is not None:
                memory.finish(place, hidden_TD)
        if self.norm is None or labels_T is None:
            return hidden_TD
        head = self.embedding if self.head is None else self.head
        assert head is not None, "a tied head needs the embedding on the same stage"
        return chunked_token_loss(
            self.norm(hidden_TD), head.weight, labels_T, shard=self._vocab_shard(), chunk_tokens=self.loss_chunk_tokens
        )

    def _vocab_shard(self) -> VocabShard:
        if self.tensor.size == 1:
            return VocabShard(start=0, valid_size=self.spec.vocab_size, reduce_max=_same, reduce_sum=_same)
        group = self.tensor.group
        return VocabShard(
            start=self.tensor.rank * self.padded_vocab // self.tensor.size,
            valid_size=self.spec.vocab_size,
            reduce_max=lambda tensor: comm.all_reduce_max(tensor, group),
            reduce_sum=lambda tensor: comm.all_reduce_sum(tensor, group),
        )


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
