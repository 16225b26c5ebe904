"""What happens to the saved activations of a microbatch's layers; the same on all ranks that share a layer."""

from __future__ import annotations

from dataclasses import dataclass

SWAP_KEEPS_LAYERS = 2
"""The backward of the last layers starts at once, so their copies out would delay the copies back (MEMO, section 4)."""
RECOMPUTE_KEEPS_LAYERS = 1
"""The last layer's backward would recompute at once what its forward has just dropped."""

_NEARLY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPolicy:
    """Token-wise swap and recompute (MEMO, section 4). Fractions are shares of a microbatch's local rows.

    Of every tensor that a token-wise step makes and the backward needs, the first ``swap_fraction`` of the rows goes to
    a tier, the next ``keep_fraction`` is kept, and the rest is recomputed before the layer's backward. ``by_step``
    overrides the fractions for single steps: ``((step name, swap, keep), ...)``. The *pair*, which is the layer input
    and what attention saved (its output and LSE), is never recomputed: ``pair_fraction`` of its bytes is swapped if
    ``swap_pair``, else all of it is kept. ``row_multiple``: splits fall on multiples of it, for kernels that prefer
    even sizes. ``kept_layers``: how many of the last layers are kept whole; None: as few as the policy allows.
    """

    swap_fraction: float = 0.0
    keep_fraction: float = 1.0
    swap_pair: bool = False
    by_step: tuple[tuple[str, float, float], ...] = ()
    row_multiple: int = 1
    pair_fraction: float = 1.0
    kept_layers: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.pair_fraction <= 1:
            raise ValueError(f"pair fraction out of range: {self.pair_fraction}")
        for swap, keep in self._fractions():
            if not (0 <= swap <= 1 and 0 <= keep <= 1 and swap + keep <= 1 + _NEARLY):
                raise ValueError(f"fractions out of range: swap {swap}, keep {keep}")

    @property
    def keeps_all(self) -> bool:
        return not self.swaps and not self.recomputes

    @property
    def swaps(self) -> bool:
        return self.swap_pair or any(swap > 0 for swap, _ in self._fractions())

    @property
    def recomputes(self) -> bool:
        return any(swap + keep < 1 - _NEARLY for swap, keep in self._fractions())

    @property
    def num_kept_layers(self) -> int:
        """Last layers whose activations stay on the device."""
        if self.kept_layers is not None:
            return self.kept_layers
        return SWAP_KEEPS_LAYERS if self.swaps else RECOMPUTE_KEEPS_LAYERS

    def split(self, step: str, num_rows: int) -> tuple[int, int]:
        """(rows swapped, rows kept) of what ``step`` makes, from row 0 on; the other rows are recomputed."""
        own = {name: (swap, keep) for name, swap, keep in self.by_step}
        swap, keep = own.get(step, (self.swap_fraction, self.keep_fraction))
        num_swapped = self._rounded(swap, num_rows)
        return num_swapped, self._rounded(swap + keep, num_rows) - num_swapped

    def split_pair(self, num_elements: int) -> tuple[int, int]:
        """(elements swapped, elements kept) of a tensor of the pair; it may have any layout."""
        num_swapped = round(self.pair_fraction * num_elements) if self.swap_pair else 0
        return num_swapped, num_elements - num_swapped

    def _fractions(self) -> tuple[tuple[float, float], ...]:
        return ((self.swap_fraction, self.keep_fraction), *((swap, keep) for _, swap, keep in self.by_step))

    def _rounded(self, fraction: float, num_rows: int) -> int:
        if fraction >= 1 - _NEARLY:
            return num_rows
        return min(num_rows, round(fraction * num_rows / self.row_multiple) * self.row_multiple)


KEEP_ALL = ActivationPolicy()
RECOMPUTE_ALL = ActivationPolicy(keep_fraction=0.0)
