"""Peers' exchanges around attention as plain callables on Longhaul's kernel (see ``benchmarks.peers.systems``).

Shapes: T rows of this rank, S rows of the whole group, N query heads, K KV heads, X query or KV heads, H head dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from benchmarks.peers.kernel import FlashCall, install_flash_attn, packed_pairs
from parallel import comm
from parallel.kernel import AttentionKernel, Pairs

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Bind = Callable[[tuple[int, ...]], Attention]
"""From the padded document lengths of a microbatch (tokens, whole group) to its attention, which maps
``q_TNH, k_TKH, v_TKH`` to ``out_TNH`` on this rank's rows."""


def connect(name: str, group: comm.Group, kernel: AttentionKernel, device: torch.device) -> Bind:
    """Import the peer ``name`` and return its exchange, bound to a sequence-parallel group."""
    return {"deepspeed": _deepspeed, "verl": _verl, "ring-flash-attn": _ring}[name](group, kernel, device)


def _deepspeed(group: comm.Group, kernel: AttentionKernel, device: torch.device) -> Bind:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    layer = importlib.import_module("deepspeed.sequence.layer")
    # Attention does not use its shared-memory reduction, which needs a C++ compiler and would bypass a box's cards.
    importlib.import_module("deepspeed.ops").__compatible_ops__ = {}  # type: ignore[attr-defined]
    importlib.import_module("deepspeed.comm").init_distributed(dist_backend="gloo", verbose=False)

    def local(q_1SNH: torch.Tensor, k_1SKH: torch.Tensor, v_1SKH: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return _flash(q_1SNH[0], k_1SKH[0], v_1SKH[0], pairs, kernel).unsqueeze(0)

    shared = layer.DistributedAttention(local, group, scatter_idx=2, gather_idx=1)

    def bind(lengths: tuple[int, ...]) -> Attention:
        pairs = packed_pairs(lengths, device)

        def attention(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
            k_TKH, v_TKH = (repeat_kv(x_TKH, group.size()) for x_TKH in (k_TKH, v_TKH))
            parts = (x_TXH.unsqueeze(0) for x_TXH in (q_TNH, k_TKH, v_TKH))
            return shared(*parts, 0, None, pairs)[0]  # 0: batch dimension; None: RoPE has been applied already

        return attention

    return bind


def _verl(group: comm.Group, kernel: AttentionKernel, device: torch.device) -> Bind:
    ulysses = _import_alone("verl.utils.ulysses")

    def bind(lengths: tuple[int, ...]) -> Attention:
        pairs = packed_pairs(lengths, device)

        def attention(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
            k_TKH, v_TKH = (repeat_kv(x_TKH, group.size()) for x_TKH in (k_TKH, v_TKH))
            q_SNH, k_SKH, v_SKH = (
                ulysses.gather_seq_scatter_heads(x_TXH, seq_dim=0, head_dim=1, group=group)
                for x_TXH in (q_TNH, k_TKH, v_TKH)
            )
            out_SNH = _flash(q_SNH, k_SKH, v_SKH, pairs, kernel)
            return ulysses.gather_heads_scatter_seq(out_SNH, head_dim=1, seq_dim=0, group=group)

        return attention

    return bind


def _ring(group: comm.Group, kernel: AttentionKernel, device: torch.device) -> Bind:
    install_flash_attn(kernel)
    zigzag = _import_alone("ring_flash_attn.zigzag_ring_flash_attn_varlen")

    def bind(lengths: tuple[int, ...]) -> Attention:
        local = [size // group.size() for size in lengths]  # exact, because lengths are padded
        edges = torch.tensor([0, *local], device=device).cumsum(0, dtype=torch.int32)

        def attention(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
            return zigzag.zigzag_ring_flash_attn_varlen_func(
                q_TNH.contiguous(), k_TKH, v_TKH, edges, max(local), causal=True, group=group
            )

        return attention

    return bind


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: Pairs, kernel: AttentionKernel) -> torch.Tensor:
    return FlashCall.apply(q, k, v, pairs, kernel)


def repeat_kv(x_TKH: torch.Tensor, degree: int) -> torch.Tensor:
    """Repeat each KV head as often as needed for every one of ``degree`` ranks to get a whole head."""
    times = max(1, degree // x_TKH.shape[1])
    return x_TKH if times == 1 else x_TKH.repeat_interleave(times, dim=1)


def _import_alone(name: str) -> ModuleType:
    """Import a module without running the ``__init__`` of its packages: empty ones with the same path replace them."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.submodule_search_locations is None:
                raise ImportError(f"no package {package} to load {name} from")
            bare = ModuleType(package)
            bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations)
            sys.modules[package] = bare
    return importlib.import_module(name)
