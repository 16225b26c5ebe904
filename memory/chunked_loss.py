"""Output head and cross-entropy, chunk by chunk: the logits of all tokens never exist at once.

The gradient of a chunk's logits (softmax minus one-hot) is known together with its loss. So each chunk's logits are
computed once, turned into d(hidden) and d(weight), and freed: the backward recomputes nothing, and memory holds one
chunk. With a vocabulary split over tensor ranks, three small reductions per chunk complete the softmax.
Shapes: T tokens, C tokens of a chunk, D hidden, V vocabulary rows of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IGNORE = -100
"""Label of a token whose loss is not counted."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """This tensor rank's part of the vocabulary: rows ``start`` .. ``start + V``; logits at ``valid_size`` and above
    are padding. ``reduce_max`` and ``reduce_sum`` act in place over the tensor ranks (identity for one)."""

    start: int
    valid_size: int
    reduce_max: Reduce
    reduce_sum: Reduce


def chunked_token_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, *, shard: VocabShard, chunk_tokens: int
) -> torch.Tensor:
    """Sum of the cross-entropies of all labelled tokens (fp32 or wider scalar), differentiable once.

    ``labels_T``: global token ids or IGNORE. With tensor ranks every rank returns the same sum, and d(hidden) is
    already complete on every rank.
    """
    loss: torch.Tensor = _ChunkedTokenLoss.apply(hidden_TD, weight_VD, labels_T, shard, chunk_tokens)
    return loss


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor,
        shard: VocabShard, chunk_tokens: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        dhidden_TD = torch.zeros_like(hidden_TD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            loss, dlogits_CV = _chunk_loss(hidden_TD[rows] @ weight_VD.t(), labels_T[rows], shard, wide)
            total += loss
            dlogits_CV = dlogits_CV.to(hidden_TD.dtype)
            dhidden_TD[rows] = dlogits_CV @ weight_VD
            dweight_VD += dlogits_CV.t() @ hidden_TD[rows]
        ctx.save_for_backward(shard.reduce_sum(dhidden_TD), dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * scale.to(dhidden_TD.dtype), dweight_VD * scale.to(dweight_VD.dtype), None, None, None


def _chunk_loss(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, shard: VocabShard, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of losses, d(sum)/d(logits)) of one chunk, softmax over the whole vocabulary."""
    logits_CV = logits_CV.to(wide)
    num_rows = logits_CV.shape[1]
    num_valid = min(max(shard.valid_size - shard.start, 0), num_rows)
    if num_valid < num_rows:
        logits_CV[:, num_valid:] = -torch.inf
    highest_C = shard.reduce_max(logits_CV.amax(dim=1))
    probabilities_CV = (logits_CV - highest_C.unsqueeze(1)).exp_()
    sums_C = shard.reduce_sum(probabilities_CV.sum(dim=1))
    local_C = labels_C - shard.start
    mine_C = (local_C >= 0) & (local_C < num_valid)
    at_label_C = logits_CV.gather(1, local_C.clamp(0, num_rows - 1).unsqueeze(1)).squeeze(1)
    at_label_C = shard.reduce_sum(torch.where(mine_C, at_label_C, torch.zeros_like(at_label_C)))
    counted_C = labels_C != IGNORE
    losses_C = torch.where(counted_C, highest_C + sums_C.log() - at_label_C, torch.zeros_like(sums_C))
    dlogits_CV = probabilities_CV.div_(sums_C.unsqueeze(1))
    rows_C = torch.nonzero(mine_C).squeeze(1)
    dlogits_CV[rows_C, local_C[rows_C]] -= 1
    dlogits_CV *= counted_C.unsqueeze(1)
    return losses_C.sum(), dlogits_CV
