"""The local attention kernel behind one facade: output and log-sum-exp, never a score matrix.

Order of choice: ``flash_attn`` varlen if it can be imported, torch's own CUDA flash kernels, torch's CPU flash kernel.
Shapes: T query rows, S key rows, N query heads, K KV heads, H head dim, B pairs of one call.
``q_TNH k_SKH v_SKH -> out_TNH lse_TN``; N is a multiple of K and head n reads KV head n // (N // K).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from planner.errors import SpecError

Rows = tuple[int, int]
_BLOCK_ROWS = 1024
"""Query and key rows of one block where ``blocked_query_gradient`` multiplies blocks itself."""
_CPU_SCORES = 2**17
"""Scores of one such block on CPU, over all heads, so that two blocks fit a core's cache with their inputs (sizes
from 2^16 to 2^20 measured equally fast)."""
_CPU_KEY_ROWS = 64
"""Fewest key rows of one such block on CPU."""
_CPU_LONG_QUERY = 768
"""From this many query rows, torch's CPU kernel works on blocks of 256; below, on blocks of 64 or 32."""


@dataclass(frozen=True)
class Pairs:
    """Which query rows attend to which key rows in one varlen call. Built once per microbatch, used by every layer."""

    causal: bool
    query_rows: tuple[Rows, ...]
    key_rows: tuple[Rows, ...]
    device: torch.device

    @cached_property
    def query_index(self) -> torch.Tensor | slice:
        return _row_index(self.query_rows, self.device)

    @cached_property
    def key_index(self) -> torch.Tensor | slice:
        return _row_index(self.key_rows, self.device)

    @cached_property
    def cu_queries(self) -> torch.Tensor:
        return _cumulative(self.query_rows, self.device)

    @cached_property
    def cu_keys(self) -> torch.Tensor:
        return _cumulative(self.key_rows, self.device)

    @cached_property
    def max_query(self) -> int:
        return max(stop - start for start, stop in self.query_rows)

    @cached_property
    def max_key(self) -> int:
        return max(stop - start for start, stop in self.key_rows)


class AttentionKernel(Protocol):
    """One local attention implementation. Stateless."""

    @property
    def name(self) -> str:
        """The kernel's name in logs."""

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) for the rows of ``pairs.query_index``, in that order."""

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this call's pairs: dq for the rows of ``query_index``, dk and dv for those of ``key_index``.

        ``out`` and ``lse`` are the *final* ones over all keys, so that partial gradients simply sum.
        """

    def query_gradient(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> torch.Tensor:
        """dq alone (fp32 or wider) of a call without a mask, for keys whose gradients are not wanted."""


def choose_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The fastest kernel for this device and dtype. Raises SpecError where there is none (fp32 on CUDA)."""
    if device.type == "cpu":
        return CpuFlashKernel()
    if dtype not in (torch.bfloat16, torch.float16):
        raise SpecError(f"no flash attention kernel for {dtype} on {device.type}: use --dtype bf16")
    if importlib.util.find_spec("flash_attn") is not None:
        return FlashAttnKernel()
    return CudaFlashKernel()


def blocked_query_gradient(
    dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
    out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
) -> torch.Tensor:
    """``AttentionKernel.query_gradient`` by blocked matrix products, on any device.

    Flash backward kernels always compute dq, dk and dv. Where dk and dv are not wanted, three of their five products
    are enough: the scores, dP = dout v^T, and dq = dS k (equations of FlashAttention-2, arXiv 2307.08691, section 3.1).
    """
    assert not pairs.causal, "only for keys that all the queries see"
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    num_heads, num_kv_heads = q_TNH.shape[1], k_SKH.shape[1]
    ratio, most_rows, most_keys = num_heads // num_kv_heads, _BLOCK_ROWS, _BLOCK_ROWS
    if not q_TNH.is_cuda:
        most_rows = max(_CPU_KEY_ROWS, min(_BLOCK_ROWS, _CPU_SCORES // (num_heads * _CPU_KEY_ROWS)))
        most_keys = max(_CPU_KEY_ROWS, min(_BLOCK_ROWS, _CPU_SCORES // (num_heads * most_rows)))
    parts = []
    for (q0, q1), (k0, k1) in zip(pairs.query_rows, pairs.key_rows, strict=True):
        for start in range(q0, q1, most_rows):
            rows = slice(start, min(start + most_rows, q1))
            q, dout, out = (_by_kv_head(x_TNH[rows], ratio) for x_TNH in (q_TNH, dout_TNH, out_TNH))
            bias = -_by_kv_head(lse_TN[rows].unsqueeze(-1).to(wide), ratio)
            delta = -(dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
            dq = torch.zeros_like(q, dtype=wide)
            # on CPU the blocks are reused: allocating large ones anew would cause page faults every time
            blocks = [q.new_empty(0, dtype=wide) for _ in range(2)]
            for first in range(k0, k1, most_keys):
                keys = slice(first, min(first + most_keys, k1))
                if not q.is_cuda and blocks[0].shape[-1] != keys.stop - first:
                    blocks = [q.new_empty((*q.shape[:2], keys.stop - first), dtype=wide) for _ in range(2)]
                k, v = k_SKH[keys].transpose(0, 1), v_SKH[keys].transpose(0, 1)
                weights = _scaled_product(q, k.transpose(1, 2), scale, bias, blocks[0]).exp_()
                weights *= _scaled_product(dout, v.transpose(1, 2), 1.0, delta, blocks[1])
                if q.is_cuda:
                    dq += _product(weights.to(k.dtype), k, wide)
                else:
                    dq.baddbmm_(weights, k.to(wide))
            parts.append(dq.mul_(scale).unflatten(1, (ratio, -1)).permute(2, 0, 1, 3).flatten(1, 2))
    return _cat(parts)


class CpuFlashKernel:
    """torch's blocked CPU kernel, one call per pair because it takes no cu_seqlens. fp32, fp64 and bf16."""

    name = "torch-cpu-flash"
    query_gradient = staticmethod(blocked_query_gradient)

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses = [], []
        for (q0, q1), (k0, k1) in zip(pairs.query_rows, pairs.key_rows, strict=True):
            ratio = _rows_of_heads(q_TNH, k_SKH, pairs.causal, q1 - q0)
            out_1NTH, lse_1NT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(_heads_as_rows(q_TNH[q0:q1], ratio)), _heads_first(k_SKH[k0:k1]),
                _heads_first(v_SKH[k0:k1]), 0.0, pairs.causal, attn_mask=None, scale=scale,
            )
            outs.append(_rows_as_heads(out_1NTH[0].transpose(0, 1), ratio))
            lses.append(_rows_as_heads(lse_1NT[0].transpose(0, 1), ratio))
        return _cat(outs), _cat(lses)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        for (q0, q1), (k0, k1) in zip(pairs.query_rows, pairs.key_rows, strict=True):
            ratio = _rows_of_heads(q_TNH, k_SKH, pairs.causal, q1 - q0)
            dout, q, out, lse = (_heads_as_rows(x[q0:q1], ratio) for x in (dout_TNH, q_TNH, out_TNH, lse_TN))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(dout), _heads_first(q), _heads_first(k_SKH[k0:k1]), _heads_first(v_SKH[k0:k1]),
                _heads_first(out), lse.transpose(0, 1).unsqueeze(0).contiguous(), 0.0, pairs.causal, attn_mask=None,
                scale=scale,
            )
            parts[0].append(_rows_as_heads(dq[0].transpose(0, 1), ratio))
            parts[1].append(dk[0].transpose(0, 1))
            parts[2].append(dv[0].transpose(0, 1))
        return _cat(parts[0]), _cat(parts[1]), _cat(parts[2])


class CudaFlashKernel:
    """torch's own varlen flash attention (bf16, fp16)."""

    name = "torch-cuda-flash"
    query_gradient = staticmethod(blocked_query_gradient)

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_TNH, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
            q_TNH[pairs.query_index], k_SKH[pairs.key_index], v_SKH[pairs.key_index],
            pairs.cu_queries, pairs.cu_keys, pairs.max_query, pairs.max_key, 0.0, pairs.causal, False, scale=scale,
        )
        return out_TNH, lse_NT.transpose(0, 1)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = q_TNH.device
        no_rng = torch.zeros(2, dtype=torch.uint64, device=device)  # without dropout the kernel never reads it
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            dout_TNH[pairs.query_index], q_TNH[pairs.query_index], k_SKH[pairs.key_index], v_SKH[pairs.key_index],
            out_TNH[pairs.query_index], lse_TN[pairs.query_index].transpose(0, 1).contiguous(),
            pairs.cu_queries, pairs.cu_keys, pairs.max_query, pairs.max_key, 0.0, pairs.causal, no_rng,
            torch.empty(0, device=device), scale=scale,
        )
        return grads


class FlashAttnKernel:
    """The ``flash_attn`` package's varlen kernels (bf16, fp16)."""

    name = "flash-attn"
    query_gradient = staticmethod(blocked_query_gradient)

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out_TNH, lse_NT, *_ = _flash_attn_varlen_forward(
            q_TNH[pairs.query_index], k_SKH[pairs.key_index], v_SKH[pairs.key_index],
            pairs.cu_queries, pairs.cu_keys, pairs.max_query, pairs.max_key,
            dropout_p=0.0, softmax_scale=scale, causal=pairs.causal,
        )
        return out_TNH, lse_NT.transpose(0, 1)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        q, k, v = q_TNH[pairs.query_index], k_SKH[pairs.key_index], v_SKH[pairs.key_index]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            dout_TNH[pairs.query_index], q, k, v, out_TNH[pairs.query_index],
            lse_TN[pairs.query_index].transpose(0, 1).contiguous(), dq, dk, dv,
            pairs.cu_queries, pairs.cu_keys, pairs.max_query, pairs.max_key,
            dropout_p=0.0, softmax_scale=scale, causal=pairs.causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )
        return dq, dk, dv


def _by_kv_head(x_TNX: torch.Tensor, ratio: int) -> torch.Tensor:
    """``[T, N, X] -> [K, ratio * T, X]``: the rows of all query heads that read one KV head."""
    return x_TNX.unflatten(1, (-1, ratio)).permute(1, 2, 0, 3).flatten(1, 2)


def _rows_of_heads(q_TNH: torch.Tensor, k_SKH: torch.Tensor, causal: bool, num_rows: int) -> int:
    """How many query heads to lay out as extra rows of one head. The CPU kernel is 5 to 13 % faster over more rows, so
    with few query rows and no mask this is all query heads that read one KV head; else 1."""
    return 1 if causal or num_rows >= _CPU_LONG_QUERY else q_TNH.shape[1] // k_SKH.shape[1]


def _heads_as_rows(x_TN: torch.Tensor, ratio: int) -> torch.Tensor:
    """``[T, N, ...] -> [ratio * T, N / ratio, ...]``."""
    return x_TN if ratio == 1 else x_TN.unflatten(1, (-1, ratio)).movedim(2, 0).flatten(0, 1)


def _rows_as_heads(x_RK: torch.Tensor, ratio: int) -> torch.Tensor:
    """The inverse of ``_heads_as_rows``."""
    return x_RK if ratio == 1 else x_RK.unflatten(0, (ratio, -1)).movedim(0, 2).flatten(1, 2)


def _product(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Batched product with the result in ``wide``. On CUDA half-precision inputs are not converted first."""
    if a.is_cuda and a.dtype != wide:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))


def _scaled_product(
    a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``scale * a b + bias`` in the dtype of ``out``; on CPU the result is written to ``out``."""
    if a.is_cuda:
        return _product(a, b, out.dtype).mul_(scale).add_(bias)
    return torch.baddbmm(bias, a.to(out.dtype), b.to(out.dtype), alpha=scale, out=out)


def _heads_first(x_TNH: torch.Tensor) -> torch.Tensor:
    return x_TNH.transpose(0, 1).unsqueeze(0)


def _cat(parts: SequenceOf[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _row_index(rows: tuple[Rows, ...], device: torch.device) -> torch.Tensor | slice:
    """A slice where the rows are contiguous (no copy), else an index tensor."""
    if all(before[1] == after[0] for before, after in zip(rows, rows[1:], strict=False)):
        return slice(rows[0][0], rows[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop in rows]).to(device)


def _cumulative(rows: tuple[Rows, ...], device: torch.device) -> torch.Tensor:
    edges = [0]
    for start, stop in rows:
        edges.append(edges[-1] + stop - start)
    return torch.tensor(edges, dtype=torch.int32, device=device)
