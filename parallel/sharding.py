"""The two ways to shard a model's parameters over the data axis, both on FSDP2.

``gather_once``: parameters are gathered once before a step's first microbatch and gradients are summed once after its
last, so no collective over all ranks ever runs inside a microbatch.

FSDP does not reduce in the last backward, because ranks run different numbers of microbatches over different groups. A
rank that waits for everybody in the reduce-scatter of its last backward, while a peer waits for it in an attention
exchange of an earlier microbatch, is a deadlock (gloo blocks in the call). Instead every rank ends the step with an
*empty* microbatch: zero tokens through the whole model, in which FSDP reduces the accumulated gradients layer by layer,
in the same order on all ranks. A rank with nothing to do in a step runs only the empty microbatch.

``zero3``: a layer's parameters are gathered when it runs and freed afterwards; gradients are summed and sharded in
every backward. This needs least memory, but all ranks must run microbatches in lockstep
(``planner.pricing.lockstep``), with empty ones where they have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from planner.plan import Sharding


def shard_model(
    model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, *, compute_dtype: torch.dtype,
    gradient_dtype: torch.dtype, sharding: Sharding,
) -> None:
    """Shard parameters, gradients and (through them) optimizer state over the data axis, layer by layer, in place.

    Gradients are summed, never averaged: the loss is already divided by the global number of tokens. Where the compute
    dtype is narrower than fp32, gradients are accumulated over microbatches and reduced over ranks in
    ``gradient_dtype``; the optimizer receives fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=gradient_dtype, cast_forward_inputs=False)
    if compute_dtype in (torch.float32, torch.float64):
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in (*layers, model):
        reshard = sharding is Sharding.ZERO3 and module is not model  # the root's backward follows immediately
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for shard in _shards(model):
        shard.set_gradient_divide_factor(1.0)
        shard.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


@contextmanager
def sharded_step(model: nn.Module, sharding: Sharding, run_empty_microbatch: Callable[[], None]) -> Iterator[None]:
    """Run the step's microbatches inside this context; on exit gradients are summed and sharded. After an exception
    inside, the step's gradients are lost.

    ``gather_once``: gathers all parameters on entry and sums the gradients on exit, which are the only collectives over
    the data axis; any rank may run any number of microbatches inside. ``run_empty_microbatch`` must run forward and
    backward of zero tokens through the same model. ``zero3``: every rank must run the same number of microbatches.
    """
    if sharding is Sharding.ZERO3:
        yield
        return
    shards = _shards(model)
    for module in shards:
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_reshard_after_backward(True, recurse=False)
    run_empty_microbatch()


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
