"""Longhaul's attention inside megatron-core's ``GPTModel``: groups of any size and packed documents.

Once: ``spec = with_longhaul_attention(get_gpt_layer_local_spec())`` and
``GPTModel(config, spec, ..., position_embedding_type="none")``.
For every microbatch of the rank's program: ``packed = pack_microbatch(engine, microbatch, config, inv_freq=...)``, then
``tokens, labels = packed.pad(...)`` for the rows of ``microbatch.spans``, and
``losses = model(tokens, packed.position_ids, None, labels=labels, packed_seq_params=packed)``.
The microbatch is an argument of the forward and never state of the model, so pipeline schedules and recompute always
use the right one.
Divide ``packed.sum_losses(losses)`` by the step's token count; *sum* gradients over the data axis at the step's end.
``docs/megatron.md`` has the whole loop; the tests run it.

Shapes: T rows of the microbatch on this rank, N/K query/KV heads of this tensor rank, H head dim, F rotated pairs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.program import RankMicrobatch
from parallel.rotary import RotaryTable, rotary_table
from planner.errors import SpecError

_MEGATRON_FIELDS = frozenset(field.name for field in fields(PackedSeqParams))


@dataclass(frozen=True, slots=True)
class PackedMicrobatch:
    """One microbatch, ready for ``GPTModel``'s ``packed_seq_params``.

    ``position_ids``: int64 ``[1, T + P]``, each row's position in its own document. The last P rows are padding, which
    Megatron needs in two cases: it accepts no empty microbatch, and with sequence parallelism the number of rows must
    be a multiple of the tensor-parallel size.
    """

    attention: MicrobatchAttention
    num_rows: int
    position_ids: torch.Tensor
    rope: RotaryTable | None
    qkv_format: str = "sbhd"  # the rows as one sequence of batch 1

    @property
    def num_padding_rows(self) -> int:
        return self.position_ids.shape[1] - self.num_rows

    def pad(self, *ids_1T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens, labels... ``[1, T]`` with zeros for padding rows. Raises SpecError if they have other shapes."""
        for ids in ids_1T:
            if ids.shape != (1, self.num_rows):
                raise SpecError(f"token ids of shape {tuple(ids.shape)} for a microbatch of shape (1, {self.num_rows})")
        return tuple(functional.pad(ids, (0, self.num_padding_rows)) for ids in ids_1T)

    def sum_losses(self, losses_1T: torch.Tensor) -> torch.Tensor:
        """Sum of the token losses ``[1, T + P]`` that the model returned, without the padding rows."""
        return losses_1T[:, : self.num_rows].sum()

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse Megatron's document bounds: its RoPE would take this rank's rows for whole documents."""
        if name in _MEGATRON_FIELDS:
            raise SpecError(
                f"GPTModel wants packed_seq_params.{name}, which a Longhaul microbatch does not have: build the model "
                'with position_embedding_type="none" and give the rotary frequencies to pack_microbatch'
            )
        raise AttributeError(name)


def pack_microbatch(
    engine: AttentionEngine, microbatch: RankMicrobatch, config: TransformerConfig, *, inv_freq: torch.Tensor | None
) -> PackedMicrobatch:
    """Bind one microbatch to its groups without communication.

    ``inv_freq``: radians per position of the F rotated pairs, as in megatron-core's ``RotaryEmbedding(...).inv_freq``;
    None for a model without RoPE. Raises SpecError if they do not fit the head.
    """
    tensor_size, head_dim = config.tensor_model_parallel_size, config.kv_channels
    if inv_freq is not None and not 0 < 2 * inv_freq.numel() <= head_dim:
        raise SpecError(f"inv_freq has {inv_freq.numel()} frequencies; a head of {head_dim} takes 1 to {head_dim // 2}")
    multiple = tensor_size if config.sequence_parallel else 1
    num_padding_rows = max(-microbatch.num_rows % multiple, multiple if not microbatch.num_rows else 0)
    parts = [torch.arange(span.start_token, span.stop_token) for span in microbatch.spans]
    positions_T = torch.cat((*parts, torch.zeros(num_padding_rows, dtype=torch.int64))).to(engine.device)
    return PackedMicrobatch(
        attention=engine.bind(
            microbatch,
            num_query_heads=config.num_attention_heads // tensor_size,
            num_kv_heads=max(config.num_query_groups // tensor_size, 1),  # Megatron repeats KV heads if too few
            head_dim=head_dim,
        ),
        num_rows=microbatch.num_rows,
        position_ids=positions_T.unsqueeze(0),
        rope=None if inv_freq is None else rotary_table(
            positions_T, inv_freq, config.params_dtype, interleaved=config.rotary_interleaved
        ),
    )


def with_longhaul_attention(layer_spec: ModuleSpec) -> ModuleSpec:
    """A copy of a Megatron layer spec with Longhaul's core attention. Raises SpecError if there is none to replace."""
    spec = copy.deepcopy(layer_spec)
    attention = getattr(spec.submodules, "self_attention", None)
    submodules = getattr(attention, "submodules", None)
    if submodules is None or not hasattr(submodules, "core_attention"):
        raise SpecError("this layer spec has no self_attention with a core_attention to replace")
    submodules.core_attention = ModuleSpec(module=LonghaulCoreAttention)
    return spec


class LonghaulCoreAttention(MegatronModule):
    """``core_attention`` of one layer. It has no parameters or state: each forward's microbatch has what it needs."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Megatron's signature. Raises SpecError for every setting that this attention does not implement."""
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        refused = {
            f"attn_mask_type {attn_mask_type}: only causal": attn_mask_type is not AttnMaskType.causal,
            f"attention_type {attention_type}: only self": attention_type != "self",
            f"attention_dropout {dropout}: set 0": dropout != 0,
            f"softmax_scale {softmax_scale}: leave it None": softmax_scale is not None,
            f"softmax_type {config.softmax_type}: only vanilla": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling: set False": config.apply_query_key_layer_scaling,
            f"window_size {config.window_size}: sliding windows are not computed, set None": bool(config.window_size),
            "multi_latent_attention: set False": config.multi_latent_attention,
            "qk_clip, which needs the largest logit: set False": config.qk_clip,
            "mtp_num_layers, which shifts labels across this rank's pieces: set None": bool(config.mtp_num_layers),
            f"context_parallel_size {config.context_parallel_size}: set 1, the plan splits sequences":
                config.context_parallel_size != 1,
        }
        found = [what for what, wrong in refused.items() if wrong]
        if found:
            raise SpecError("Longhaul's attention cannot run with " + "; ".join(found))
        skips = config.no_rope_freq
        self.rotates = not (skips and skips[layer_number - 1])

    def forward(
        self,
        query_T1NH: torch.Tensor,
        key_T1KH: torch.Tensor,
        value_T1KH: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Context ``[T, 1, N * H]``, zeros in padding rows. Communicates with the microbatch's groups.

        Raises SpecError if the arguments do not fit the microbatch.
        """
        if not isinstance(packed_seq_params, PackedMicrobatch):
            raise SpecError("give GPTModel's forward packed_seq_params=pack_microbatch(...)")
        if attention_mask is not None or attention_bias is not None:
            raise SpecError("pass attention_mask=None and no bias: the plan's documents are the mask")
        packed = packed_seq_params
        if query_T1NH.shape[:2] != (packed.position_ids.shape[1], 1):
            raise SpecError(
                f"the model was given {query_T1NH.shape[1]} x {query_T1NH.shape[0]} tokens (batch x length), this "
                f"microbatch has 1 x {packed.position_ids.shape[1]}: pass tokens and labels through pad()"
            )
        q_TNH, k_TKH, v_TKH = (x_T1XH.squeeze(1) for x_T1XH in (query_T1NH, key_T1KH, value_T1KH))
        if packed.rope is not None and self.rotates:
            q_TNH, k_TKH = packed.rope.rotate(q_TNH), packed.rope.rotate(k_TKH)
        rows = slice(packed.num_rows)
        context_TC = packed.attention(q_TNH[rows], k_TKH[rows], v_TKH[rows]).flatten(1)
        return functional.pad(context_TC, (0, 0, 0, packed.num_padding_rows)).unsqueeze(1)
