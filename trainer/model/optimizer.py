"""AdamW on local shards with warm-up, cosine decay and clipping by the global norm.

The optimizer sees each parameter's local shard as a plain tensor with the same storage: the arithmetic is element-wise,
so DTensor dispatch would only cost time.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel import comm
from parallel.mesh import RankMesh
from trainer.model.initialize import is_tensor_sharded, tensor_partial_grads
from trainer.settings.tree import OptimizerConfig


def learning_rate(config: OptimizerConfig, *, step: int, num_steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine from ``lr`` to ``lr * min_lr_ratio`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a (possibly) sharded tensor, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedAdamW:
    """Optimizer state of one rank's shards. ``named_shards``: parameter name -> plain local tensor."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, mesh: RankMesh) -> None:
        self._config = config
        self._mesh = mesh
        self._parameters = dict(model.named_parameters())
        self._partial = tensor_partial_grads(model) if mesh.tensor_size > 1 else []
        self.named_shards = {name: local_shard(p.detach()) for name, p in self._parameters.items()}
        decayed = [shard for name, shard in self.named_shards.items() if self._parameters[name].ndim >= 2]
        plain = [shard for name, shard in self.named_shards.items() if self._parameters[name].ndim < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
        )

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def squared_norm(self) -> torch.Tensor:
        """This rank's part of the squared global gradient norm (float64 scalar on CPU); replicas count once.

        First sums gradients that are partial over the tensor axis; communicates over that axis if there are any.
        """
        for parameter in self._partial:
            comm.all_reduce_sum(local_shard(_grad(parameter)), self._mesh.tensor_group)
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for name, parameter in self._parameters.items():
            if self._mesh.replica == 0 and (is_tensor_sharded(name) or self._mesh.tensor_rank == 0):
                total += local_shard(_grad(parameter)).double().square().sum()
        return total.cpu()

    def step(self, *, lr: float, grad_norm: float) -> None:
        """Clip to ``clip_norm``, given ``grad_norm`` (the root of the sum of all ranks' ``squared_norm``), and
        update."""
        scale = min(1.0, self._config.clip_norm / (grad_norm + 1e-6))
        for name, parameter in self._parameters.items():
            grad = local_shard(_grad(parameter))
            self.named_shards[name].grad = grad.mul_(scale) if scale < 1.0 else grad
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for shard in self.named_shards.values():
            shard.grad = None

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state for this rank's shards; 0 before the first step."""
        return sum(value.nbytes for state in self.adamw.state.values() for value in state.values())

    def forget_state(self) -> None:
        """Return to the state before the first step."""
        self.adamw.state.clear()

    def materialize_state(self) -> None:
        """Create zeroed moments, so that a checkpoint can be loaded into them before the first step."""
        for shard in self.named_shards.values():
            state = self.adamw.state[shard]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device=shard.device)
                state["exp_avg"] = torch.zeros_like(shard)
                state["exp_avg_sq"] = torch.zeros_like(shard)


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter has no gradient after the step's empty microbatch")
    return parameter.grad
