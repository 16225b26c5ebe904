"""The layers of one wave in the replay: token-wise compute, attention, copies to the host, and how a few replayed
layers stand for all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.cost.data_sheet import GRADIENT_BYTES, LAYER_LAUNCH_S
from planner.replay.lanes import LaneRecorder
from planner.replay.state import DataRanks, Recorder, TimeLedger
from planner.replay.waves import Wave
from planner.replay.work import FloatArray

REPLAYED_LAYERS = 2
LAYER_PASSES, LOSS_PASSES = 6, 3
KEPT_LAYERS = 2
"""Number of last layers that are neither swapped nor recomputed, because their backward follows at once."""

Layer = Callable[[FloatArray, TimeLedger, Recorder | None], None]
"""``layer(clock, ledger, record)`` advances every rank's clock by one layer."""


def all_layers(
    wave: Wave, layer: Layer, clock: FloatArray, num_layers: int, name: str, recorder: LaneRecorder | None
) -> tuple[TimeLedger, float]:
    """Advance the clock over all layers of one direction. Returns their seconds, and those per layer of the slowest
    part."""
    size, ranks = len(clock), wave.ranks
    before = drawn_from = clock.copy()
    spent = last = TimeLedger.empty(size)
    for number in range(min(num_layers, REPLAYED_LAYERS)):
        before, last = clock.copy(), TimeLedger.empty(size)
        layer(clock, last, recorder if number == 0 else None)
        spent.add(last)
        if number == 0:
            drawn_from = clock.copy()
    pace_s = np.maximum(_by_part(wave, clock) - _by_part(wave, before), _by_part(wave, last.compute_s))
    rest = num_layers - REPLAYED_LAYERS
    if rest > 0:
        here = np.isin(np.arange(size), ranks)
        _stretch(last, np.where(here, pace_s - (clock - before), 0.0))
        spent.add(last, rest)
        clock += np.where(here, rest * pace_s, 0.0)
    if recorder is not None and num_layers > 1:
        recorder("compute", f"{name} of {num_layers - 1} more layers", ranks, drawn_from[ranks], clock[ranks])
    return spent, float(pace_s[ranks].max())


def layers(
    wave: Wave, data_ranks: DataRanks, is_free: bool = False
) -> tuple[Layer, Layer, FloatArray]:
    """One layer's forward and backward as functions of the clock, and the seconds of the output head, both passes."""
    forward_s, backward_s, head_s = (
        wave.num_chunks * seconds for seconds in token_seconds(wave.rank_tokens / wave.num_chunks, data_ranks)
    )
    backward_s = backward_s + wave.recompute_fraction * forward_s
    machine, model, layers = data_ranks.machine, data_ranks.model, data_ranks.model.num_layers
    layer_bytes = model.saved_bytes_per_token(data_ranks.element_bytes) * wave.rank_tokens / data_ranks.tensor_parallel
    copy_s = wave.swap_fraction * layer_bytes / machine.host_bytes_per_s * max(0, layers - KEPT_LAYERS) / layers
    reduce_s = np.zeros_like(forward_s) if is_free else _tensor_parallel_s(wave.rank_tokens, data_ranks)
    weights = (model.num_query_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_dim
    early = weights / model.layer_active_params

    def layer(is_forward: bool, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        start = clock.copy()
        seconds, share = (forward_s, early) if is_forward else (backward_s, 1 - early)
        _compute(wave, clock, ledger, record, "before attention", share * seconds)
        for run in wave.runs:
            (run.forward if is_forward else run.backward)(clock, ledger, record)
        _compute(wave, clock, ledger, record, "after attention", (1 - share) * seconds)
        clock += reduce_s
        ledger.exposed_s += reduce_s
        if wave.swap_fraction.any():
            copied = np.where(copy_s > 0, start + copy_s, clock)
            if record is not None:
                record("copy", "to the host" if is_forward else "from the host", wave.ranks, start[wave.ranks],
                       (start + copy_s)[wave.ranks])
            ledger.swap_s += np.maximum(0.0, copied - clock)
            np.maximum(clock, copied, out=clock)

    return (
        lambda clock, ledger, record: layer(True, clock, ledger, record),
        lambda clock, ledger, record: layer(False, clock, ledger, record),
        head_s,
    )


def token_seconds(tokens: FloatArray, data_ranks: DataRanks) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds for this many tokens: one layer's forward and backward without attention, and both passes of the output
    head.

    Bytes moved in a layer's forward, by LAYER_PASSES kernels: two norms (read, write) and two residuals (two reads, one
    write), 10 x hidden; RoPE, 2 x (q + k); the gate, 3 x ffn (2 without one) per active expert. The backward moves them
    twice. The loss passes over the logits three times. Kernel launches are a lower bound per layer, because they run
    ahead while the device is busy.
    """
    machine, model, element_bytes = data_ranks.machine, data_ranks.model, data_ranks.element_bytes
    split = data_ranks.tensor_parallel
    active, weights = model.layer_active_params / split, model.layer_linear_params / split
    rope = 2 * (model.num_query_heads + model.num_kv_heads) * model.head_dim
    gate = model.active_experts * (3 if model.gated_mlp else 2) * model.ffn_dim
    moved_bytes = tokens * element_bytes * (10 * model.hidden_dim + (rope + gate) / split)
    forward_s = machine.products_s(2 * active, tokens, element_bytes * weights)
    forward_s += machine.move_s(moved_bytes, LAYER_PASSES)
    grads_bytes = (element_bytes + 2 * GRADIENT_BYTES) * weights  # weights are read, gradients are accumulated
    backward_s = machine.products_s(4 * active, tokens, grads_bytes) + machine.move_s(2 * moved_bytes, LAYER_PASSES)
    head = model.hidden_dim * model.vocab_size / split
    head_s = machine.products_s(6 * head, tokens, (2 * element_bytes + 2 * GRADIENT_BYTES) * head)
    head_s += machine.move_s(LOSS_PASSES * element_bytes * model.vocab_size / split * tokens, LOSS_PASSES)
    floor_s = np.where(tokens > 0, LAYER_LAUNCH_S / 3, 0.0)
    return np.maximum(forward_s, floor_s), np.maximum(backward_s, 2 * floor_s), head_s


def _tensor_parallel_s(tokens: FloatArray, data_ranks: DataRanks) -> FloatArray:
    """Seconds of two all-reduces of the hidden states in each pass."""
    size, machine = data_ranks.tensor_parallel, data_ranks.machine
    if size == 1:
        return np.zeros_like(tokens)
    near = machine.cluster.devices_per_node
    link = machine.intra_node if size <= near else machine.inter_node
    wire_bytes = 2 * (size - 1) / size * data_ranks.model.hidden_dim * data_ranks.element_bytes * tokens
    return np.where(tokens > 0, 2 * (machine.collective_latency_s(size, near) + wire_bytes / link.bytes_per_s), 0.0)


def _compute(
    wave: Wave, clock: FloatArray, ledger: TimeLedger, record: Recorder | None, name: str, seconds: FloatArray
) -> None:
    if record is not None:
        record("compute", name, wave.ranks, clock[wave.ranks], (clock + seconds)[wave.ranks])
    clock += seconds
    ledger.compute_s += seconds


def windows(
    wave: Wave, clock: FloatArray, forward: Layer, backward: Layer
) -> list[tuple[list[FloatArray], list[FloatArray]]]:
    """When each group of each run is active in a layer's forward and backward, starting from the clock."""
    windows = []
    for layer, is_forward in ((forward, True), (backward, False)):
        trial, ledger = clock.copy(), TimeLedger.empty(len(clock))
        layer(trial, ledger, None)  # the second layer starts with the ranks' clocks after the first
        starts, stops = [], []
        for run in wave.runs:
            starts.append(trial[run.ranks].min(axis=1))
            (run.forward if is_forward else run.backward)(trial, ledger, None)
            stops.append(trial[run.ranks].max(axis=1))
        windows.append((starts, stops))
    return windows


def _by_part(wave: Wave, values: FloatArray) -> FloatArray:
    """For each rank, the largest value among the ranks that groups connect it with."""
    top = np.full(len(values), -np.inf)
    np.maximum.at(top, wave.part, values)
    return np.asarray(top[wave.part], dtype=np.float64)


def _stretch(ledger: TimeLedger, slack_s: FloatArray) -> None:
    """Make a layer take ``slack_s`` longer. This adds to waiting; a negative slack is taken from waiting first, then
    from exposed seconds."""
    ledger.idle_s += slack_s
    for giver, taker in ((ledger.exposed_s, ledger.idle_s), (ledger.swap_s, ledger.exposed_s)):
        short = np.minimum(0.0, taker)
        taker -= short
        giver += short
    np.maximum(ledger.swap_s, 0.0, out=ledger.swap_s)  # rounding
