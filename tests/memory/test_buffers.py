"""Buffers that are used again: never two live tensors in one place, and a swapped microbatch needs few of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.buffers import BufferArena
from memory.policy import ActivationPolicy
from memory.token_swap import MicrobatchMemory
from planner.allocation import GREEDY_ONLY, plan_addresses, requests_from_events
from tests.memory.test_token_swap import build, host_tier, run

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)


def place_of(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def overlap(first, second):
    return first[0] < second[1] and second[0] < first[1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.sampled_from(DTYPES)), max_size=40),
       st.randoms(use_true_random=False))
def test_live_tensors_never_share_a_byte(takes, rng):
    """Each holds its own pattern from its take to the death of its last view."""
    arena, live = BufferArena(), []
    for number, (rows, columns, dtype) in enumerate(takes):
        tensor = arena.take((rows, columns), dtype, CPU)
        assert tensor.shape == (rows, columns) and tensor.dtype == dtype and tensor.is_contiguous()
        if rows:
            tensor.view(torch.uint8).fill_(number % 2 if dtype is torch.bool else number)
        assert not any(overlap(place_of(tensor), place_of(other)) for other, _ in live)
        # what autograd holds is often a view, and the tensor itself is gone
        live.append((tensor.as_strided(tensor.shape, tensor.stride()) if rng.random() < 0.5 else tensor, number))
        del tensor
        if rng.random() < 0.5:
            live.pop(rng.randrange(len(live)))
        for other, pattern in live:
            if other.numel():
                assert other.view(torch.uint8).eq(pattern % 2 if other.dtype is torch.bool else pattern).all()
    assert arena.num_taken == len(takes)


def test_a_buffer_is_used_again_only_after_its_last_view():
    arena = BufferArena()
    first = arena.take((4, 2), torch.float32, CPU)
    view, place = first[1:], place_of(first)
    del first
    second = arena.take((4, 2), torch.float32, CPU)
    assert not overlap(place_of(second), place)
    del view
    third = arena.take((2, 2), torch.float64, CPU)
    assert place_of(third) == place, "as many bytes, of another dtype"
    assert (arena.num_taken, arena.num_reused, arena.made_bytes) == (3, 1, 64)


def test_closed_it_keeps_nothing():
    arena = BufferArena()
    early, late = (arena.take((8,), torch.float32, CPU) for _ in range(2))
    del early
    arena.close()
    del late
    assert not arena._free
    arena.take((8,), torch.float32, CPU)
    assert arena.num_reused == 0


class Recorded(BufferArena):
    """Writes down what is taken and when it dies: (name, bytes or -1, address)."""

    def __init__(self):
        super().__init__()
        self.events, self.tenants = [], {}

    def take(self, shape, dtype, device):
        tensor = super().take(shape, dtype, device)
        address, _ = place_of(tensor)
        self.tenants[address] = self.num_taken
        self.events.append((self.num_taken, tensor.nbytes, address))
        return tensor

    def _give(self, buffer):
        self.events.append((self.tenants[buffer.ctypes.data], -1, buffer.ctypes.data))
        super()._give(buffer)


def replay(events):
    """Go through the events; no two that live may overlap."""
    live = {}
    for name, num_bytes, address in events:
        if num_bytes < 0:
            del live[name]
        else:
            span = address, address + num_bytes
            assert not any(overlap(span, other) for other in live.values()), f"tensor {name} lies over a live one"
            live[name] = span
    return live


def test_replay_of_a_swapped_microbatch_finds_no_overlap_and_the_least_memory():
    """Nine layers of which seven swap: the buffers of two suffice, as in an optimal plan of addresses."""
    layers, num_rows = build(9), 512
    tier, _ = host_tier(16 * 2**20)
    policy = ActivationPolicy(swap_fraction=0.5, keep_fraction=0.25, swap_pair=True)
    memory = MicrobatchMemory(policy, tier, num_layers=9, num_rows=num_rows)
    arena = memory.buffers = Recorded()
    wanted = run(layers, num_rows)
    got = run(layers, num_rows, memory)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert not replay(arena.events), "all of them died"
    per_layer, rest = divmod(arena.num_taken, 7)
    assert not rest and arena.num_reused >= 4 * per_layer
    plan = plan_addresses(requests_from_events((name, size) for name, size, _ in arena.events), GREEDY_ONLY)
    assert plan.is_optimal and arena.made_bytes <= plan.peak_bytes


def test_replay_sees_an_overlap():
    with pytest.raises(AssertionError, match="tensor 2 lies over"):
        replay([(1, 64, 1000), (2, 8, 1060)])
