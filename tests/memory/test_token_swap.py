"""Swapping and recomputing by token: gradients equal those of plain autograd, whatever the fractions. What is swapped
comes back bit by bit; what is recomputed equals it wherever a product over some of the rows does (float64: 1e-12)."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from memory.disk_tier import DiskTier
from memory.ledger import MemoryLedger
from memory.peak import PeakMemory, give_back_freed_memory, map_large_blocks
from memory.policy import KEEP_ALL, RECOMPUTE_ALL, ActivationPolicy
from memory.tape import PAIR, LayerTape, TapeError
from memory.tiers import HostTier
from memory.token_swap import MicrobatchMemory
from planner.units import MIB

CPU = torch.device("cpu")
WIDTH, HEADS = 16, 2
STEPS = ("norm", "qkv", "out", "mlp")


class Layer(nn.Module):
    """A layer in small: views, norms with their own saved tensors, a residual that two steps read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.calls = []

    def _qkv(self, x, scale):
        self.calls.append(("qkv", x.shape[0]))
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(1)
        return q * scale, functional.normalize(k, dim=-1), v

    def _mlp(self, x):
        self.calls.append(("mlp", x.shape[0]))
        gate, up = self.up(x).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def _attention(self, q, k, v):
        self.calls.append(("attention", q.shape[0]))
        return Causal.apply(q, k, v)

    def forward(self, x, scale, tape):
        q, k, v = tape.step("qkv", self._qkv, tape.step("norm", self.norm, x), scale)
        context = tape.attention(self._attention, q, k, v)
        x = tape.step("out", lambda x, c: x + self.out(c.flatten(1)), x, context)
        return tape.step("down", lambda x, m: x + self.down(m), x, tape.step("mlp", self._mlp, x))


class Causal(torch.autograd.Function):
    """Causal attention that saves q, k, v, out and log-sum-exp, as flash attention does."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = torch.einsum("snh,tnh->nst", q, k)
        scores = scores.masked_fill(torch.ones(q.shape[0], q.shape[0]).triu(1).bool(), -torch.inf)
        lse = scores.logsumexp(-1)
        out = torch.einsum("nst,tnh->snh", (scores - lse.unsqueeze(-1)).exp(), v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        scores = torch.einsum("snh,tnh->nst", q, k)
        scores = scores.masked_fill(torch.ones(q.shape[0], q.shape[0]).triu(1).bool(), -torch.inf)
        p = (scores - lse.unsqueeze(-1)).exp()
        dp = torch.einsum("snh,tnh->nst", dout, v)
        ds = p * (dp - (dout * out).sum(-1).t().unsqueeze(-1))
        return (
            torch.einsum("nst,tnh->snh", ds, k), torch.einsum("nst,snh->tnh", ds, q),
            torch.einsum("nst,snh->tnh", p, dout),
        )


def host_tier(capacity_bytes=MIB):
    ledger = MemoryLedger({"host": capacity_bytes, "disk": capacity_bytes})
    return HostTier(capacity_bytes, ledger, CPU), ledger


def build(num_layers=4, dtype=torch.float64):
    torch.manual_seed(3)
    return nn.ModuleList(Layer().to(dtype) for _ in range(num_layers))


def run(layers, num_rows, memory=None, dtype=torch.float64):
    """Output, and gradients of the input and of every parameter."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    scale = torch.rand(num_rows, 1, 1, generator=generator, dtype=dtype)
    hidden = x * 1
    for place, layer in enumerate(layers):
        memory = memory or MicrobatchMemory(KEEP_ALL, None, num_layers=len(layers), num_rows=num_rows)
        hidden = layer(hidden, scale, memory.tape(place, layer.parameters()))
        memory.finish(place, hidden)
    leaves = [x, *layers.parameters()]
    return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), leaves)]


FRACTION = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1)


@st.composite
def policies(draw):
    swap = draw(FRACTION)
    keep = draw(st.sampled_from([0.0, 1.0]) | FRACTION) * (1 - swap)
    others = [(name, draw(FRACTION), draw(FRACTION)) for name in STEPS if draw(st.booleans())]
    by_step = tuple((name, swapped, kept * (1 - swapped)) for name, swapped, kept in others)
    return ActivationPolicy(
        swap_fraction=swap, keep_fraction=keep, swap_pair=draw(st.booleans()), by_step=by_step,
        pair_fraction=draw(st.sampled_from([0.0, 0.3, 1.0])),
        row_multiple=draw(st.sampled_from([1, 1, 4])),
    )


class TestExactness:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(policies(), st.sampled_from([0, 1, 2, 3, 7, 33]), st.sampled_from([1, 2, 3, 5]), st.booleans())
    def test_any_fractions_any_rows(self, policy, num_rows, num_layers, keeps_last):
        layers = build(num_layers)
        tier, ledger = host_tier()
        memory = MicrobatchMemory(policy, tier, num_layers=num_layers, num_rows=num_rows, keeps_last=keeps_last)
        wanted, got = run(layers, num_rows), run(layers, num_rows, memory)
        for a, b in zip(wanted, got, strict=True):
            if policy.recomputes:
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
            else:
                assert torch.equal(a, b)
        assert ledger.used_bytes("host") == 0, "every place in the tier is free again"
        assert memory.unsplit_bytes == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtypes_through_a_file(self, dtype):
        layers = build(dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            tier = DiskTier(Path(folder) / "swap", MIB, MemoryLedger({"disk": MIB}))
            policy = ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0, swap_pair=True)
            memory = MicrobatchMemory(policy, tier, num_layers=4, num_rows=29)
            wanted, got = run(layers, 29, dtype=dtype), run(layers, 29, memory, dtype=dtype)
            tier.close()
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        assert tier.written_bytes == tier.read_bytes > 0


def peak_growth(folder, how):
    """Bytes by which the resident set peaks over its start: six layers of 16384 rows, forward and backward."""
    torch.set_num_threads(1)
    map_large_blocks(fine=True)
    layers, num_rows, tier = build(6, torch.float32), 2**14, None
    for layer in layers:
        layer._attention = lambda q, k, v: q * k + v
    policy = KEEP_ALL
    if how == "disk":
        tier = DiskTier(Path(folder) / "swap", 64 * MIB, MemoryLedger({"disk": 64 * MIB}))
        policy = ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0, swap_pair=True)
    run(layers, 64, dtype=torch.float32)  # what loads once is loaded
    give_back_freed_memory()
    peak = PeakMemory(CPU)
    peak.reset()
    start_bytes = peak.read_bytes()
    memory = MicrobatchMemory(policy, tier, num_layers=6, num_rows=num_rows)
    run(layers, num_rows, memory, torch.float32)
    return peak.read_bytes() - start_bytes


class TestResidentMemory:
    def test_falls_as_planned(self, tmp_path):
        """A layer keeps about 33 MiB. Of six, two stay and two are under way; keeping holds all six."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            keep, disk = (pool.submit(peak_growth, tmp_path, how).result() for how in ("keep", "disk"))
        assert disk < 0.8 * keep, (keep, disk)


class TestWork:
    def test_attention_never_runs_twice_and_steps_run_on_their_rows_only(self):
        layers = build()
        tier, _ = host_tier()
        policy = ActivationPolicy(
            swap_fraction=0.25, keep_fraction=0.25, swap_pair=True, by_step=(("mlp", 0.75, 0.25),)
        )
        memory = MicrobatchMemory(policy, tier, num_layers=4, num_rows=40)
        run(layers, 40, memory)
        for layer in layers[:2]:
            assert layer.calls == [("qkv", 40), ("attention", 40), ("mlp", 40), ("qkv", 20)]
        for layer in layers[2:]:
            assert layer.calls == [("qkv", 40), ("attention", 40), ("mlp", 40)], "the last two layers stay"

    def test_recompute_keeps_the_pair_and_one_layer(self):
        layers = build()
        memory = MicrobatchMemory(RECOMPUTE_ALL, None, num_layers=4, num_rows=8)
        run(layers, 8, memory)
        assert [len(layer.calls) for layer in layers] == [5, 5, 5, 3]

    def test_bytes_in_the_tier_are_the_fractions(self):
        layers = build()
        tier, _ = host_tier()
        memory = MicrobatchMemory(
            ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0, swap_pair=True), tier, num_layers=4, num_rows=64
        )
        hidden = torch.randn(64, WIDTH, dtype=torch.float64, requires_grad=True) * 1
        scale = torch.rand(64, 1, 1, dtype=torch.float64)
        tape = memory.tape(0, layers[0].parameters())
        output = layers[0](hidden, scale, tape)
        memory.finish(0, output)
        (saved,) = memory.saved_bytes()
        assert saved[PAIR] == 64 * 8 * (WIDTH + WIDTH + HEADS)  # input, attention output, log-sum-exp
        assert saved["down"] == 0
        assert tier.written_bytes == saved[PAIR] + (sum(saved.values()) - saved[PAIR]) // 2

    def test_only_one_backward(self):
        (layer,) = build(1)
        tape = LayerTape(RECOMPUTE_ALL, None, layer.parameters(), 5)
        x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True) * 1
        output = layer(x, torch.ones(5, 1, 1, dtype=torch.float64), tape).sum()
        tape.finish()
        output.backward(retain_graph=True)
        with pytest.raises(TapeError, match="one backward"):
            output.backward()

    def test_a_step_that_mixes_rows_is_an_error(self):
        tape = LayerTape(ActivationPolicy(keep_fraction=0.5), None, (), 6)
        x = torch.randn(6, WIDTH, requires_grad=True) * 1
        output = tape.step("wide", lambda x: (x.repeat_interleave(6 // x.shape[0], 1) * 1).exp(), x).sum()
        tape.finish()
        with pytest.raises(TapeError, match="step wide"):
            output.backward()


def under_a_cap(folder, how):
    """Whether the six layers train with 75 MiB more than the process has: RLIMIT_DATA, enforced by the system."""
    torch.set_num_threads(1)
    map_large_blocks(fine=True)
    run(build(6, torch.float32), 64, dtype=torch.float32)
    with Path("/proc/self/status").open() as status:
        (used,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + 75 * MIB, used + 75 * MIB))
    try:
        peak_growth(folder, how)
    except RuntimeError as error:
        return str(error)
    return "fits"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts maps on Linux only")
def test_what_keeping_cannot_do_under_a_cap_swapping_can(tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        keep, disk = (pool.submit(under_a_cap, tmp_path, how).result() for how in ("keep", "disk"))
    assert "allocate memory" in keep and disk == "fits", (keep, disk)
