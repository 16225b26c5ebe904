"""Initial weights as a pure function of (seed, parameter name): the same model at any world size and any slicing."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from planner.model_spec import ModelSpec
from trainer.transformer import Decoder

_EMBEDDING_STD = 0.02


def initialize_weights(model: Decoder, *, seed: int) -> None:
    """Fill an unsharded model in place (this tensor rank's slices). Draws each full tensor on the CPU, one at a time.

    Matrices are normal with std fan_in^-0.5, those that write into the residual stream times (2 layers)^-0.5
    (GPT-2's rule); embedding and head 0.02; norms one; padded vocabulary rows zero.
    """
    spec, tensor = model.spec, model.tensor
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            full = _full_weight(f"{name}.weight", module, spec, model.padded_vocab, seed)
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            with torch.no_grad():
                module.weight.copy_(full.chunk(tensor.size, dim=dim)[tensor.rank])


def _full_weight(name: str, module: nn.Module, spec: ModelSpec, padded_vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    if name.startswith(("embedding.", "head.")):
        weight = torch.randn(spec.vocab_size, spec.hidden_dim, generator=generator) * _EMBEDDING_STD
        return nn.functional.pad(weight, (0, 0, 0, padded_vocab - spec.vocab_size))
    shape = (module.output_size, module.input_size)
    residual = 1 / math.sqrt(2 * spec.num_layers) if isinstance(module, RowParallelLinear) else 1.0
    return torch.randn(*shape, generator=generator) * (residual / math.sqrt(shape[1]))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1


def tensor_partial_grads(model: nn.Module) -> list[nn.Parameter]:
    """Parameters every tensor rank holds whole but sees only through its own heads: their gradients must be summed
    over the tensor group (the QK norms)."""
    return [
        parameter for name, parameter in model.named_parameters() if "query_norm" in name or "key_norm" in name
    ]


def is_tensor_sharded(name: str) -> bool:
    """Whether each tensor rank holds a different slice of this parameter (all but the norms)."""
    return "norm" not in name
