"""The kernel facade: CPU kernel here, CUDA kernels against it where there is a device."""

from __future__ import annotations

import pytest
import torch

from parallel.kernel import CpuFlashKernel, CudaFlashKernel, FlashAttnKernel, Pairs, choose_kernel
from planner.errors import SpecError

CPU = torch.device("cpu")


def make_inputs(device, dtype, num_queries=40, num_keys=56):
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_queries, 4, 16), (num_keys, 2, 16), (num_keys, 2, 16), (num_queries, 4, 16)]
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


CALLS = {
    "one run of rows": (((0, 10), (10, 40)), ((0, 16), (16, 56))),
    "rows with gaps": (((2, 10), (25, 33)), ((5, 9), (20, 56))),
}


def run(kernel, inputs, query_rows, key_rows, *, causal=False):
    q, k, v, dout = inputs
    pairs = Pairs(causal, query_rows, key_rows, q.device)
    out, lse = kernel.forward(q, k, v, pairs, 0.25)
    full_out, full_lse = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=lse.dtype, device=q.device)
    full_out[pairs.query_index], full_lse[pairs.query_index] = out, lse
    return out, lse, *kernel.backward(dout, q, k, v, full_out, full_lse, pairs, 0.25)


@pytest.mark.parametrize("name", CALLS)
def test_cpu_kernel_equals_dense_softmax(name):
    query_rows, key_rows = CALLS[name]
    inputs = make_inputs(CPU, torch.float64)
    got = run(CpuFlashKernel(), inputs, query_rows, key_rows)
    wanted = [[], [], [], [], []]
    for (q0, q1), (k0, k1) in zip(query_rows, key_rows, strict=True):
        q, k, v = (x[a:b].clone().requires_grad_() for x, a, b in zip(inputs, (q0, k0, k0), (q1, k1, k1), strict=False))
        scores = torch.einsum("snh,tnh->nst", q, k.repeat_interleave(2, 1)) * 0.25
        out = torch.einsum("nst,tnh->snh", scores.softmax(-1), v.repeat_interleave(2, 1))
        grads = torch.autograd.grad(out, (q, k, v), inputs[3][q0:q1])
        for part, value in zip(wanted, (out.detach(), scores.logsumexp(-1).T.detach(), *grads), strict=True):
            part.append(value)
    for ours, parts in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, torch.cat(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_queries", [130, 600, 900], ids=["one block", "heads as rows", "heads apart"])
def test_dq_alone_is_the_dq_of_the_backward(num_queries):
    inputs = make_inputs(CPU, torch.float64, num_queries=num_queries, num_keys=150)
    q, k, v, dout = inputs
    pairs = Pairs(False, ((3, num_queries),), ((1, 150),), CPU)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=q.dtype)
    out[pairs.query_index], lse[pairs.query_index] = CpuFlashKernel().forward(q, k, v, pairs, 0.25)
    untouched = lse.clone()
    for ratio in (1, 2):  # as many KV heads as query heads, and half as many
        keys, values = k.repeat_interleave(2 // ratio, 1), v.repeat_interleave(2 // ratio, 1)
        arguments = (dout, q, keys, values, out, lse, pairs, 0.25)
        wanted = CpuFlashKernel().backward(*arguments)[0]
        torch.testing.assert_close(CpuFlashKernel().query_gradient(*arguments), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(lse, untouched)


def test_rows_that_form_one_run_are_sliced_not_copied():
    assert Pairs(False, ((3, 5), (5, 9)), ((0, 1), (2, 3)), CPU).query_index == slice(3, 9)
    assert Pairs(False, ((3, 5), (5, 9)), ((0, 1), (2, 3)), CPU).key_index.tolist() == [0, 2]
    assert Pairs(False, ((3, 5), (5, 9)), ((0, 1), (2, 3)), CPU).cu_queries.tolist() == [0, 2, 6]


def test_choice_of_kernel():
    assert isinstance(choose_kernel(CPU, torch.float32), CpuFlashKernel)
    with pytest.raises(SpecError, match="bf16"):
        choose_kernel(torch.device("cuda"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel_class", [CudaFlashKernel, FlashAttnKernel])
def test_cuda_kernels_equal_the_cpu_kernel(kernel_class, name, causal):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if kernel_class is FlashAttnKernel:
        pytest.importorskip("flash_attn")
    query_rows, key_rows = CALLS[name]
    if causal:
        key_rows = query_rows
    inputs = make_inputs(torch.device("cuda"), torch.bfloat16)
    wanted = run(CpuFlashKernel(), [x.double().cpu() for x in inputs], query_rows, key_rows, causal=causal)
    got = run(kernel_class(), inputs, query_rows, key_rows, causal=causal)
    for ours, expected in zip(got, wanted, strict=True):
        error = (ours.double().cpu() - expected).norm() / expected.norm()
        assert error < 1e-2, error
