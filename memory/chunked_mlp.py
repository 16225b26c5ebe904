"""The MLP of a layer, piece by piece: its intermediate activations never exist for all rows at once.

Forward and backward run over pieces of rows. The forward saves only the input. For each piece the backward recomputes
the intermediates, computes that piece's gradients and frees them (Mini-Sequence Transformer, arXiv 2407.15892,
section 3). The last matrix product and its sum over tensor ranks are not recomputed.
Shapes: T rows, C rows of a piece, D hidden, F columns of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

RowWise = Callable[[torch.Tensor], torch.Tensor]


def chunked_mlp(
    rows_TD: torch.Tensor, *, inner: RowWise, inner_parameters: SequenceOf[torch.Tensor], outer: RowWise,
    outer_weight_DF: torch.Tensor, chunk_tokens: int,
) -> torch.Tensor:
    """``rows + outer(inner(rows))`` ``[T, D]``, ``chunk_tokens`` rows at a time, differentiable once.

    ``inner``: token-wise, ``[C, D]`` to ``[C, F]``; it uses exactly ``inner_parameters``, which all need gradients.
    ``outer``: ``x @ outer_weight^T`` without bias, summed over the tensor ranks if there are several; the gradient of
    the result is the same on all of them. Parameter gradients are summed over pieces in fp32 or wider. Zero rows run as
    one empty piece, so that every parameter gets a gradient and tensor ranks, which have equal rows, run the same
    collectives.
    """
    result: torch.Tensor = _ChunkedMLP.apply(rows_TD, inner, outer, chunk_tokens, outer_weight_DF, *inner_parameters)
    return result


class _ChunkedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_TD: torch.Tensor, inner: RowWise, outer: RowWise, chunk_tokens: int,
        outer_weight_DF: torch.Tensor, *inner_parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.inner, ctx.chunk_tokens = inner, chunk_tokens
        # not saved for backward: a saved-tensor hook would return other tensors than those that ``inner`` uses
        ctx.outer_weight_DF, ctx.inner_parameters = outer_weight_DF, inner_parameters
        ctx.save_for_backward(rows_TD)
        result_TD = torch.empty_like(rows_TD)
        for piece in _pieces(rows_TD, chunk_tokens):
            result_TD[piece] = rows_TD[piece] + outer(inner(rows_TD[piece]))
        return result_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dresult_TD,) = grad_outputs
        (rows_TD,) = ctx.saved_tensors
        weight_DF, parameters = ctx.outer_weight_DF, ctx.inner_parameters
        drows_TD = torch.empty_like(rows_TD)
        sums: list[torch.Tensor] = []
        for piece in _pieces(rows_TD, ctx.chunk_tokens):
            rows_CD, dresult_CD = rows_TD[piece].detach().requires_grad_(), dresult_TD[piece]
            with torch.enable_grad():
                inner_CF = ctx.inner(rows_CD)
            dweight_DF = dresult_CD.t() @ inner_CF.detach()
            drows_CD, *dparameters = torch.autograd.grad(inner_CF, (rows_CD, *parameters), dresult_CD @ weight_DF)
            drows_TD[piece] = drows_CD + dresult_CD
            _add(sums, [dweight_DF, *dparameters])
        gradients = [total.to(of.dtype) for total, of in zip(sums, (weight_DF, *parameters), strict=True)]
        return drows_TD, None, None, None, *gradients


def _pieces(rows_TD: torch.Tensor, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, max(1, len(rows_TD)), chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Add one piece's gradients to the sums; the first piece creates them."""
    if sums:
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    else:
        sums += [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
