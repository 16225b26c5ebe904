"""Longhaul's attention kernel in the forms that peers call, so that all systems compute with the same kernel.

Shapes: T query rows, S key rows, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from parallel.kernel import AttentionKernel, Pairs


def packed_pairs(lengths: tuple[int, ...], device: torch.device) -> Pairs:
    """The pairs of one varlen call: causal attention of whole documents, packed one behind the other."""
    edges = [0]
    for size in lengths:
        edges.append(edges[-1] + size)
    rows = tuple(pairwise(edges))
    return Pairs(causal=True, query_rows=rows, key_rows=rows, device=device)


class FlashCall(torch.autograd.Function):
    """One differentiable kernel call: ``(q_TNH, k_SKH, v_SKH, pairs, kernel) -> out_TNH``."""

    @staticmethod
    def forward(
        ctx: Any, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, kernel: AttentionKernel
    ) -> torch.Tensor:
        scale = q_TNH.shape[-1] ** -0.5
        out_TNH, lse_TN = kernel.forward(q_TNH, k_SKH, v_SKH, pairs, scale)
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, out_TNH, lse_TN)
        ctx.call = pairs, kernel, scale
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs, kernel, scale = ctx.call
        grads = kernel.backward(grad_outputs[0].contiguous(), *ctx.saved_tensors, pairs, scale)
        return (*grads, None, None)


def install_flash_attn(kernel: AttentionKernel) -> None:
    """Replace the flash_attn package in this process by the two varlen functions that ring-flash-attn calls, with the
    same argument names, computed by ``kernel``. Dropout, windows and ALiBi are ignored; nothing here sets them."""

    def _flash_attn_varlen_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        pairs = _pairs(cu_seqlens_q, cu_seqlens_k, causal, q.device)
        out_TNH, lse_TN = kernel.forward(q, k, v, pairs, softmax_scale)
        return out_TNH, lse_TN.transpose(0, 1), None, None

    def _flash_attn_varlen_backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        softmax_lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, **unused: Any,
    ) -> None:
        pairs = _pairs(cu_seqlens_q, cu_seqlens_k, causal, q.device)
        grads = kernel.backward(dout, q, k, v, out, softmax_lse.transpose(0, 1), pairs, softmax_scale)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    package, interface = (_module(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    vars(interface).update({f.__name__: f for f in (_flash_attn_varlen_forward, _flash_attn_varlen_backward)})
    vars(package).update(flash_attn_interface=interface, __path__=[])
    sys.modules.update({package.__name__: package, interface.__name__: interface})


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def _pairs(cu_queries: torch.Tensor, cu_keys: torch.Tensor, causal: bool, device: torch.device) -> Pairs:
    queries, keys = (tuple(pairwise(edges.tolist())) for edges in (cu_queries, cu_keys))
    return Pairs(causal=causal, query_rows=queries, key_rows=keys, device=device)
