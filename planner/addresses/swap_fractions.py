"""Which saved activations of a layer to swap, keep or recompute: MEMO's single fraction, or one fraction per tensor.

MEMO (arXiv 2407.12117, section 4) uses the same fraction alpha for all tensors: the largest for which the copy out of
one layer is hidden by the forward of the next, and ``n - 2`` layers fit into host memory. But tensors differ: the
output of a norm costs almost nothing to recompute, that of a matrix product costs much. With one fraction per tensor
the program

    minimise    (n - 2) * (recompute seconds + exposed copy seconds of a layer)
    subject to  swapped_i + kept_i + recomputed_i = 1,   all >= 0                         for every tensor i
                exposed forward  >= swapped bytes / store rate - forward seconds,   >= 0
                exposed backward >= swapped bytes / load rate  - backward seconds,  >= 0
                (n - 2) * swapped bytes <= host capacity,    (n - 2) * kept bytes <= device bytes to spare

is still a knapsack: every byte of a tensor saves the same number of seconds wherever it is held. Places are filled from
the cheapest (device, hidden copies, exposed copies) with the tensors that save most seconds per byte; a tensor is put
into an exposed place only if recomputing it costs more than copying it. This gives the exact optimum without a solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from planner.errors import InfeasibleError, SpecError
from planner.units import format_bytes, format_seconds

_NEARLY = 1e-9


class Binding(StrEnum):
    """What limits the held fractions. NOTHING: everything is held somewhere. LINK: further copies would be exposed for
    longer than recomputing takes. HOST: the tier is full."""

    NOTHING = "nothing"
    LINK = "link"
    HOST = "host"


class PairPlace(StrEnum):
    """Where the pair (layer input, and attention's output and LSE) is held; it is never recomputed."""

    TIER = "tier"
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """What one token-wise step saves, per token and layer, and how long recomputing it takes."""

    name: str
    bytes_per_token: float
    recompute_s_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapProblem:
    """One microbatch of ``num_tokens`` local tokens on one device. ``pair_bytes_per_token``: layer input, attention
    output and LSE of a layer. ``num_layers``: layers of the stage; the last ``num_kept_layers`` of them are kept whole.

    ``forward_s``, ``backward_s``: one layer's computation, which hides the copies of its neighbour.
    ``store_bytes_per_s``, ``load_bytes_per_s``: rates from the device and back. ``tier_capacity_bytes``: this rank's
    share of host memory or disk. ``device_spare_bytes``: device memory for kept activations of the swapped layers.
    """

    tensors: tuple[SavedTensor, ...]
    pair_bytes_per_token: float
    num_tokens: int
    num_layers: int
    num_kept_layers: int = 2
    forward_s: float
    backward_s: float
    store_bytes_per_s: float
    load_bytes_per_s: float
    tier_capacity_bytes: float
    device_spare_bytes: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.pair_bytes_per_token, self.num_tokens, self.forward_s, self.backward_s, self.tier_capacity_bytes,
                 self.device_spare_bytes, *(t.bytes_per_token for t in self.tensors),
                 *(t.recompute_s_per_token for t in self.tensors))
        if min(sizes) < 0 or not all(map(math.isfinite, sizes)):
            raise SpecError("swap program: sizes, times and capacities must be finite and 0 or more")
        if min(self.store_bytes_per_s, self.load_bytes_per_s) <= 0:
            raise SpecError("swap program: link rates must be above 0 bytes/s")

    @property
    def num_swapped_layers(self) -> int:
        return max(0, self.num_layers - self.num_kept_layers)

    @property
    def pair_bytes(self) -> float:
        """Bytes of the pair of one layer."""
        return self.pair_bytes_per_token * self.num_tokens

    @property
    def hidden_bytes(self) -> float:
        """Most bytes of one layer whose copies are hidden in both directions."""
        return min(self.forward_s * self.store_bytes_per_s, self.backward_s * self.load_bytes_per_s)

    def exposed_s(self, swapped_bytes: float) -> float:
        """Seconds of one layer's copies, in both directions, that no computation hides."""
        return max(0.0, swapped_bytes / self.store_bytes_per_s - self.forward_s) + max(
            0.0, swapped_bytes / self.load_bytes_per_s - self.backward_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """Fractions in the order of the problem's tensors (the rest is recomputed), and their predicted cost.

    ``tier_bytes``, ``device_bytes``: of all swapped layers together. The latter is only what the plan keeps, without
    the layers that are kept whole or in use. ``recompute_s``, ``exposed_s``: seconds per microbatch.
    """

    swap_fractions: tuple[float, ...]
    keep_fractions: tuple[float, ...]
    pair: PairPlace
    binding: Binding
    tier_bytes: float
    device_bytes: float
    recompute_s: float
    exposed_s: float

    @property
    def added_s(self) -> float:
        """How many seconds longer a microbatch takes than with everything kept."""
        return self.recompute_s + self.exposed_s

    def describe(self, problem: SwapProblem) -> str:
        """One line for the log."""
        shares = ", ".join(
            f"{tensor.name} {swap:.0%}" + (f" + {keep:.0%} kept" if keep else "")
            for tensor, swap, keep in zip(problem.tensors, self.swap_fractions, self.keep_fractions, strict=True)
            if tensor.bytes_per_token
        )
        pair = "layer input and attention output swapped"
        if self.pair is PairPlace.DEVICE:
            pair = "layer input and attention output stay on the device (the tier cannot take them in time)"
        return (
            f"{pair}; of the rest swapped: {shares}; bound by {self.binding}; predicted per microbatch of "
            f"{problem.num_tokens} tokens: {format_bytes(self.tier_bytes)} in the tier, "
            f"{format_seconds(self.recompute_s)} recomputing, {format_seconds(self.exposed_s)} waiting for copies"
        )


def memo_alpha(problem: SwapProblem) -> SwapPlan:
    """MEMO's plan: the largest single fraction that link time and host capacity allow; the pair is always swapped.

    The paper does not say what happens if the pair alone is too slow to copy or too large for the tier. Here: if it is
    too slow, alpha is 0 and the exposed seconds are reported; if it is too large, InfeasibleError is raised.
    """
    _require_pair_fits(problem, problem.tier_capacity_bytes, "the tier")
    others = sum(tensor.bytes_per_token for tensor in problem.tensors) * problem.num_tokens
    layers = problem.num_swapped_layers
    link = problem.hidden_bytes - problem.pair_bytes
    host = problem.tier_capacity_bytes / layers - problem.pair_bytes if layers else math.inf
    room = min(link, host)
    alpha = 1.0 if others <= max(room, 0.0) else max(0.0, room) / others
    binding = Binding.NOTHING if alpha >= 1 else Binding.LINK if link <= host else Binding.HOST
    count = len(problem.tensors)
    return _priced(problem, (alpha,) * count, (0.0,) * count, PairPlace.TIER, binding)


def solve_fractions(problem: SwapProblem) -> SwapPlan:
    """The optimum of the program in the module's docstring; never slower than ``memo_alpha``.

    The pair is swapped, or kept on the device if it fits there and that is faster or the tier cannot hold it. Raises
    InfeasibleError if it fits nowhere.
    """
    layers = problem.num_swapped_layers
    device_room = problem.device_spare_bytes / layers if layers else math.inf
    tier_room = problem.tier_capacity_bytes / layers if layers else math.inf
    plans = []
    if problem.pair_bytes <= tier_room:
        plans.append(_fill(problem, device_room, tier_room - problem.pair_bytes, PairPlace.TIER))
    if problem.pair_bytes <= device_room:
        plans.append(_fill(problem, device_room - problem.pair_bytes, tier_room, PairPlace.DEVICE))
    if not plans:
        _require_pair_fits(problem, max(problem.tier_capacity_bytes, problem.device_spare_bytes), "tier or device")
    return min(plans, key=lambda plan: plan.added_s)


def _require_pair_fits(problem: SwapProblem, capacity_bytes: float, where: str) -> None:
    needed = problem.pair_bytes * problem.num_swapped_layers
    if needed > capacity_bytes:
        raise InfeasibleError(
            f"layer inputs and attention outputs of {problem.num_swapped_layers} layers of {problem.num_tokens} tokens "
            f"need {format_bytes(needed)}, {where} has {format_bytes(capacity_bytes)}: give the tier more room, use "
            "more ranks or shorter samples",
            binding="swap tier", needed_bytes=math.ceil(needed), available_bytes=int(capacity_bytes),
        )


def _fill(problem: SwapProblem, device_room: float, tier_room: float, pair: PairPlace) -> SwapPlan:
    """Fill the places of one layer, cheapest first. Rooms are bytes per layer, without the pair's."""
    in_tier = problem.pair_bytes if pair is PairPlace.TIER else 0.0
    places = _places(problem, device_room, tier_room, in_tier)
    order = sorted(range(len(problem.tensors)), key=lambda i: -_seconds_per_byte(problem.tensors[i]))
    swap, keep = [0.0] * len(order), [0.0] * len(order)
    binding = Binding.NOTHING
    for index in order:
        tensor = problem.tensors[index]
        size = tensor.bytes_per_token * problem.num_tokens
        left = size
        if not size:
            swap[index] = 1.0
            continue
        for place in places:
            if left <= 0 or (place.seconds_per_byte > 0 and place.seconds_per_byte >= _seconds_per_byte(tensor)):
                break
            taken = min(left, place.room)
            place.room -= taken
            left -= taken
            (swap if place.in_tier else keep)[index] += taken / size
        if left > _NEARLY * size and binding is Binding.NOTHING:
            tier_is_full = all(place.room <= 0 for place in places if place.in_tier)
            binding = Binding.HOST if tier_is_full else Binding.LINK
    return _priced(problem, tuple(swap), tuple(keep), pair, binding)


@dataclass(slots=True)
class _Place:
    """Room for bytes of one layer, and the seconds that each byte there costs."""

    room: float
    seconds_per_byte: float
    in_tier: bool


def _places(problem: SwapProblem, device_room: float, tier_room: float, in_tier: float) -> list[_Place]:
    """The device, then parts of the tier by the cost of a further byte: hidden, exposed one way, exposed both ways."""
    ways = sorted(
        (seconds * rate, 1 / rate)
        for seconds, rate in (
            (problem.forward_s, problem.store_bytes_per_s), (problem.backward_s, problem.load_bytes_per_s)
        )
    )
    places = [_Place(device_room, 0.0, False)]
    start, cost, stop = in_tier, 0.0, in_tier + tier_room
    for edge, slope in (*ways, (math.inf, 0.0)):
        room = min(edge, stop) - start
        if room > 0:
            places.append(_Place(room, cost, True))
            start += room
        cost += slope
    return places


def _seconds_per_byte(tensor: SavedTensor) -> float:
    return tensor.recompute_s_per_token / tensor.bytes_per_token if tensor.bytes_per_token else math.inf


def _priced(
    problem: SwapProblem, swap: tuple[float, ...], keep: tuple[float, ...], pair: PairPlace, binding: Binding
) -> SwapPlan:
    swap, keep = tuple(min(1.0, share) for share in swap), tuple(min(1.0, share) for share in keep)
    layers, tokens = problem.num_swapped_layers, problem.num_tokens
    swapped = kept = seconds = 0.0
    for tensor, out, stay in zip(problem.tensors, swap, keep, strict=True):
        swapped += tensor.bytes_per_token * tokens * out
        kept += tensor.bytes_per_token * tokens * stay
        seconds += tensor.recompute_s_per_token * tokens * max(0.0, 1 - out - stay)
    if pair is PairPlace.TIER:
        swapped += problem.pair_bytes
    else:
        kept += problem.pair_bytes
    return SwapPlan(
        swap_fractions=swap, keep_fractions=keep, pair=pair, binding=binding, tier_bytes=layers * swapped,
        device_bytes=layers * kept, recompute_s=layers * seconds, exposed_s=layers * problem.exposed_s(swapped),
    )
