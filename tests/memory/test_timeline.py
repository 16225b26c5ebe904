"""What a timeline notes: layers in order, recomputing within a backward, every copied byte; a bounded number of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from memory.activations import ActivationMemory
from memory.disk_tier import DiskTier
from memory.ledger import MemoryLedger
from memory.policy import RECOMPUTE_ALL, ActivationPolicy
from memory.tiers import HOST, HostTier
from memory.timeline import Timeline
from memory.token_swap import MicrobatchMemory
from planner.measured.copy_times import BACK, LAYERS, OUT, WAIT, copy_seconds
from planner.units import MIB
from tests.memory.test_token_swap import WIDTH, Layer

CPU = torch.device("cpu")
NUM_LAYERS, NUM_ROWS = 5, 40
HALF = ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0, swap_pair=True)


def one_step(memory: ActivationMemory, device: torch.device = CPU, width: int = NUM_ROWS) -> None:
    torch.manual_seed(0)
    layers = [Layer().to(device) for _ in range(NUM_LAYERS)]
    x = torch.randn(width, WIDTH, device=device, requires_grad=True)
    scale = torch.ones(width, 1, 1, device=device)
    memory.timeline.restart(device)
    held = MicrobatchMemory(
        memory.policy, memory.tier, num_layers=NUM_LAYERS, num_rows=width, timeline=memory.recorder
    )
    for place, layer in enumerate(layers):
        x = layer(x, scale, held.tape(place, layer.parameters()))
        held.finish(place, x)
    x.sum().backward()
    if memory.recorder is not None:
        memory.recorder.end()


def of_lane(memory: ActivationMemory, lane: str):
    return sorted((each for each in memory.timeline.read() if each.lane == lane), key=lambda each: each.start_s)


@pytest.fixture(params=["host", "disk"])
def memory(request, tmp_path):
    ledger = MemoryLedger({request.param: 4 * MIB})
    tier = (
        HostTier(4 * MIB, ledger, CPU) if request.param == HOST else DiskTier(tmp_path / "swap", 4 * MIB, ledger)
    )
    memory = ActivationMemory(policy=HALF, tier=tier, ledger=ledger)
    yield memory
    memory.close()


class TestSteps:
    def test_layers_follow_one_another_and_recomputing_lies_within_a_backward(self, memory):
        memory.record(True)
        one_step(memory)
        found = of_lane(memory, LAYERS)
        layers = [each for each in found if not each.name.startswith("recompute")]
        backwards = list(reversed(range(NUM_LAYERS)))
        wanted = [f"forward {place}" for place in range(NUM_LAYERS)] + [f"backward {place}" for place in backwards]
        assert [each.name for each in layers] == wanted
        assert all(before.stop_s <= after.start_s for before, after in itertools.pairwise(layers))
        again = [each for each in found if each not in layers]
        assert {each.name for each in again} >= {"recompute qkv", "recompute mlp"}
        for each in again:
            assert any(
                outer.name.startswith("backward") and outer.start_s <= each.start_s and each.stop_s <= outer.stop_s
                for outer in layers
            )

    def test_every_byte_out_and_back_is_noted_with_its_layer(self, memory):
        memory.record(True)
        one_step(memory)
        for lane, num_bytes in ((OUT, memory.tier.written_bytes), (BACK, memory.tier.read_bytes)):
            copies = of_lane(memory, lane)
            assert sum(each.num_bytes for each in copies) == num_bytes > 0
            assert {each.name for each in copies} == {f"layer {place}" for place in range(NUM_LAYERS - 2)}
            assert all(before.stop_s <= after.start_s for before, after in itertools.pairwise(copies))

    def test_copies_that_the_computing_thread_makes_itself_are_not_hidden(self, memory):
        memory.record(True)
        one_step(memory)
        copy_s, hidden_s = copy_seconds(memory.timeline.read())
        if memory.tier.name == HOST:
            assert copy_s > 0 and hidden_s == pytest.approx(0, abs=1e-9)
        waits = of_lane(memory, WAIT)
        assert waits and all(before.stop_s <= after.start_s for before, after in itertools.pairwise(waits))

    def test_nothing_is_noted_unless_asked(self, memory):
        one_step(memory)
        memory.record(True)
        memory.record(False)
        one_step(memory)
        assert memory.timeline.read() == () and memory.tier.timeline is None

    def test_recomputing_alone_needs_no_tier(self):
        memory = ActivationMemory(policy=RECOMPUTE_ALL)
        memory.record(True)
        one_step(memory)
        assert {each.lane for each in memory.timeline.read()} == {LAYERS}
        assert any(each.name.startswith("recompute") for each in memory.timeline.read())


def test_what_is_beyond_the_most_is_counted_only():
    timeline = Timeline(most_intervals=3)
    timeline.restart(CPU)
    for number in range(5):
        timeline.begin(str(number))
    timeline.end()
    assert [each.name for each in timeline.read()] == ["0", "1", "2"] and timeline.num_left_out == 2
    timeline.restart(CPU)
    assert timeline.read() == () and timeline.num_left_out == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_begin_and_end_are_the_streams_own():
    device = torch.device("cuda", 0)
    ledger = MemoryLedger({HOST: 256 * MIB})
    memory = ActivationMemory(policy=HALF, tier=HostTier(256 * MIB, ledger, device), ledger=ledger)
    memory.record(True)
    one_step(memory, device, width=4096)
    found = memory.timeline.read()
    assert all(0 <= each.start_s <= each.stop_s for each in found)
    out = [each for each in found if each.lane == OUT]
    assert sum(each.num_bytes for each in out) == memory.tier.written_bytes > 0
    layers = [each for each in found if each.lane == LAYERS and each.name.startswith("forward")]
    assert any(
        copy.start_s < layer.stop_s and layer.start_s < copy.stop_s for copy in out for layer in layers
    ), "no copy out ran beside a forward"
    memory.close()
