"""The MLP in pieces: results and gradients of the plain one, of which only the input is saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from memory.chunked_mlp import chunked_mlp
from memory.policy import KEEP_ALL, RECOMPUTE_ALL, ActivationPolicy
from memory.tape import LayerTape
from memory.token_swap import MicrobatchMemory
from tests.memory.test_token_swap import WIDTH, Layer, host_tier, policies

FFN = 24
PLAIN_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


class MLP(nn.Module):
    """Norm, SwiGLU, residual; ``log``: rows of every call of the inner part and of the last product."""

    def __init__(self, dtype=torch.float64, chunk_tokens=0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.norm = nn.RMSNorm(WIDTH, dtype=dtype)
        self.up = nn.Linear(WIDTH, 2 * FFN, bias=False, dtype=dtype)
        self.down = nn.Linear(FFN, WIDTH, bias=False, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        self.chunk_tokens = chunk_tokens
        self.log = []

    def inner(self, x):
        self.log.append(("inner", len(x)))
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return functional.silu(gate) * up

    def outer(self, product):
        self.log.append(("outer", len(product)))
        return self.down(product)

    def forward(self, x):
        if not self.chunk_tokens:
            return x + self.outer(self.inner(x))
        return chunked_mlp(
            x, inner=self.inner, inner_parameters=(self.norm.weight, self.up.weight), outer=self.outer,
            outer_weight_DF=self.down.weight, chunk_tokens=self.chunk_tokens,
        )


def run(mlp, num_rows, dtype):
    """Output and gradients of input and parameters, for a gradient that differs by row and column."""
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = (torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x.requires_grad_()
    output = mlp(x * 1)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [x, *mlp.parameters()])]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 70), st.integers(1, 80), st.sampled_from([torch.float64, torch.float32]))
def test_equals_the_plain_one(num_rows, chunk_tokens, dtype):
    wanted, got = run(MLP(dtype), num_rows, dtype), run(MLP(dtype, chunk_tokens), num_rows, dtype)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, rtol=PLAIN_TOLERANCES[dtype], atol=10 * PLAIN_TOLERANCES[dtype])


def test_gradcheck():
    mlp = MLP(chunk_tokens=3)
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *mlp.parameters()), fast_mode=True)


def test_bf16_gradients_of_many_pieces_are_summed_in_fp32():
    """Of 512 equal terms a sum in bf16 stops growing after 256."""
    rows, gradients = torch.ones(512, WIDTH, dtype=torch.bfloat16), []
    for chunk_tokens in (1, 512):
        mlp = MLP(torch.bfloat16, chunk_tokens)
        mlp(rows).sum().backward()
        gradients.append([parameter.grad.double() for parameter in mlp.parameters()])
    for pieces, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0.01, atol=1e-4)


def test_each_piece_runs_twice_and_its_last_product_once():
    mlp = MLP(chunk_tokens=3)
    run(mlp, 7, torch.float64)
    forward = [(name, rows) for rows in (3, 3, 1) for name in ("inner", "outer")]
    assert mlp.log == [*forward, ("inner", 3), ("inner", 3), ("inner", 1)]
    empty = MLP(chunk_tokens=3)
    gradients = run(empty, 0, torch.float64)
    assert empty.log == [("inner", 0), ("outer", 0), ("inner", 0)], "collectives and parameter gradients need a piece"
    assert all(not gradient.any() for gradient in gradients)


def saved_bytes(run):
    """Bytes of distinct storages that autograd keeps, parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_only_the_input_is_saved():
    x = torch.randn(50, WIDTH, dtype=torch.float64, requires_grad=True) * 1
    assert saved_bytes(lambda: MLP(chunk_tokens=8)(x)) == x.nbytes
    assert saved_bytes(lambda: MLP()(x)) > x.nbytes + 50 * 4 * FFN * 8


class ChunkedLayer(Layer):
    """The tape tests' layer with its MLP in pieces."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(chunk_tokens=5)

    def forward(self, x, scale, tape):
        q, k, v = tape.step("qkv", self._qkv, tape.step("norm", self.norm, x), scale)
        context = tape.attention(self._attention, q, k, v)
        x = tape.step("out", lambda x, c: x + self.out(c.flatten(1)), x, context)
        return tape.step("mlp", self.mlp, x)


def build(num_layers):
    torch.manual_seed(3)
    layers = nn.ModuleList(ChunkedLayer().double() for _ in range(num_layers))
    for layer in layers:
        del layer.up, layer.down  # of the plain layer
    return layers


def run_layers(layers, num_rows, memory):
    x = torch.randn(
        num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows), dtype=torch.float64, requires_grad=True
    )
    scale = torch.ones(num_rows, 1, 1, dtype=torch.float64)
    hidden = x * 1
    for place, layer in enumerate(layers):
        hidden = layer(hidden, scale, memory.tape(place, layer.parameters()))
        memory.finish(place, hidden)
    return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [x, *layers.parameters()])]


class TestOnATape:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(policies(), st.sampled_from([0, 1, 4, 5, 17]), st.sampled_from([1, 3]), st.booleans())
    def test_any_policy(self, policy, num_rows, num_layers, keeps_last):
        layers, (tier, ledger) = build(num_layers), host_tier()
        memory = MicrobatchMemory(policy, tier, num_layers=num_layers, num_rows=num_rows, keeps_last=keeps_last)
        got = run_layers(layers, num_rows, memory)
        for layer in layers:
            layer.mlp.chunk_tokens = 0
        plain = MicrobatchMemory(KEEP_ALL, None, num_layers=num_layers, num_rows=num_rows)
        wanted = run_layers(layers, num_rows, plain)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        assert ledger.used_bytes("host") == 0 and memory.unsplit_bytes == 0

    @pytest.mark.parametrize("policy", [
        RECOMPUTE_ALL, ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0, swap_pair=True),
    ], ids=["recompute", "swap"])
    def test_the_step_saves_nothing_and_the_tape_never_runs_it_again(self, policy):
        (layer,), (tier, _) = build(1), host_tier()
        tape = LayerTape(policy, tier, layer.parameters(), 12)
        x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True) * 1
        output = layer(x, torch.ones(12, 1, 1, dtype=torch.float64), tape)
        tape.finish()
        saved = tape.saved_bytes()
        assert saved["mlp"] == 0 and saved["out"] == 2 * x.nbytes, "its result, and attention's, flattened by a copy"
        output.sum().backward()
        inner = [rows for name, rows in layer.mlp.log if name == "inner"]
        assert inner == [5, 5, 2] * 2, "forward and backward, and no third time"
        assert tape.recomputed_rows == 3 * (12 - sum(policy.split("norm", 12))), "norm, qkv, out"
