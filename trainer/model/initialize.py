"""Initial weights as a pure function of (seed, parameter name): the same at any world size and with any slicing."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from trainer.model.transformer import Decoder

_EMBEDDING_STD = 0.02


def initialize_weights(model: Decoder, *, seed: int) -> None:
    """Fill an unsharded model in place (this tensor rank's slices). Draws each full tensor on the CPU, one at a time.

    Matrices are normal with std fan_in^-0.5; those that write into the residual stream are multiplied by
    (2 layers)^-0.5 (GPT-2's rule). Embedding and head have std 0.02, norms are one, padded vocabulary rows are zero.
    """
    tensor = model.tensor
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            full = _full_weight(f"{name}.weight", module.weight.shape, dim, model, seed)
            with torch.no_grad():
                module.weight.copy_(full.chunk(tensor.size, dim=dim)[tensor.rank])


def _full_weight(name: str, slice_shape: torch.Size, dim: int, model: Decoder, seed: int) -> torch.Tensor:
    """The full matrix of which this tensor rank holds a slice along ``dim`` (1: it writes into the residual stream)."""
    spec, generator = model.spec, torch.Generator().manual_seed(_seed_of(seed, name))
    if name.startswith(("embedding.", "head.")):
        weight = torch.randn(spec.vocab_size, spec.hidden_dim, generator=generator) * _EMBEDDING_STD
        return nn.functional.pad(weight, (0, 0, 0, model.padded_vocab - spec.vocab_size))
    rows, columns = (size * (model.tensor.size if axis == dim else 1) for axis, size in enumerate(slice_shape))
    residual = 1 / math.sqrt(2 * spec.num_layers) if dim == 1 else 1.0
    return torch.randn(rows, columns, generator=generator) * (residual / math.sqrt(columns))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1


def tensor_partial_grads(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that every tensor rank holds whole but applies only to its own heads (the QK norms). Their gradients
    must be summed over the tensor group."""
    return [
        parameter for name, parameter in model.named_parameters() if "query_norm" in name or "key_norm" in name
    ]


def is_tensor_sharded(name: str) -> bool:
    """Whether each tensor rank holds a different slice of this parameter (all but the norms)."""
    return "norm" not in name
