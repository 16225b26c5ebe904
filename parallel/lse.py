"""Partial softmax results and how to merge them.

Shapes: T query rows, N query heads, H head dim. Outputs ``out_TNH``, log-sum-exps ``lse_TN`` (natural log, of the
scaled scores). Merging is done in at least fp32 whatever the training dtype.
"""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself for fp32 and fp64."""
    return torch.promote_types(dtype, torch.float32)


def merge_partial(
    out_TNH: torch.Tensor, lse_TN: torch.Tensor, part_TNH: torch.Tensor, part_lse_TN: torch.Tensor
) -> None:
    """Fold a partial result over more keys into the running one, in place.

    softmax over the union of two key sets is the mean of the two outputs weighted by exp(lse): the online softmax of
    Milakov and Gimelshein (arXiv 1805.02867), applied to whole blocks.
    """
    merged = torch.logaddexp(lse_TN, part_lse_TN)
    out_TNH.mul_(torch.exp(lse_TN - merged).unsqueeze(-1))
    out_TNH.add_(part_TNH.to(out_TNH.dtype) * torch.exp(part_lse_TN - merged).unsqueeze(-1))
    lse_TN.copy_(merged)
