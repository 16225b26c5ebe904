"""Rotary position embedding (RoPE, arXiv 2104.09864) at explicit positions, which restart at every document.

Shapes: T rows, N heads, H head dim, F rotated pairs (2 F <= H).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin ``[T, 1, F]`` of a microbatch's rows, for all its layers.

    ``interleaved``: neighbouring elements of a head form a pair; else elements i and i + F do (the Llama convention).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def rotate(self, x_TNH: Tensor) -> Tensor:
        """See the function ``rotate``."""
        return rotate(x_TNH, self.cos, self.sin, interleaved=self.interleaved)


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians per position of each pair when the whole head is rotated, float64 ``[H / 2]``."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rotary_table(
    positions_T: Tensor, inv_freq_F: Tensor, dtype: torch.dtype, *, interleaved: bool = False
) -> RotaryTable:
    """The table for ``inv_freq_F`` radians per position, in ``dtype`` but at least fp32.

    Angles are computed in float64: in float32, angles at position one million are off by some hundredths of a radian.
    """
    angles_T1F = positions_T.to(torch.float64)[:, None, None] * inv_freq_F.to(positions_T.device, torch.float64)
    dtype = torch.promote_types(dtype, torch.float32)
    return RotaryTable(angles_T1F.cos().to(dtype), angles_T1F.sin().to(dtype), interleaved)


def rotate(x_TNH: Tensor, cos_T1F: Tensor, sin_T1F: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 F elements of every head, in the table's dtype; the result has x's dtype."""
    rotated = 2 * cos_T1F.shape[-1]
    turning = x_TNH[..., :rotated].to(cos_T1F.dtype)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    turned = (first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    if rotated == x_TNH.shape[-1]:
        return joined.to(x_TNH.dtype)
    return torch.cat((joined.to(x_TNH.dtype), x_TNH[..., rotated:]), dim=-1)
