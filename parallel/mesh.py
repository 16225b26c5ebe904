"""The grid of ranks: stage x data x tensor. Groups are made here once and passed as arguments from then on.

Global rank = (stage * data_size + data_rank) * tensor_size + tensor_rank. So the ranks of a tensor-parallel group are
consecutive, the data ranks of one stage are near each other, and stages, which communicate least, are furthest apart.
The data axis may be split into replicas: ``shard_size`` consecutive data ranks share one copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel import comm
from planner.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class GridShape:
    """How many ranks along each axis. ``shard_size``: data ranks that share one copy of the weights (a divisor of
    ``data_size``). ``of`` raises SpecError where the numbers do not fit each other."""

    num_stages: int
    data_size: int
    tensor_size: int
    shard_size: int

    @classmethod
    def of(cls, world_size: int, *, tensor_size: int, num_stages: int = 1, shard_size: int | None = None) -> GridShape:
        """The grid of ``world_size`` ranks; ``shard_size`` None: all data ranks share one copy."""
        share = tensor_size * num_stages
        if world_size % share:
            raise SpecError(
                f"--tensor-parallel {tensor_size} x --pipeline-parallel {num_stages} does not divide the world size "
                f"{world_size}"
            )
        data_size = world_size // share
        if data_size % (shard_size or data_size):
            raise SpecError(f"--parallel.shard-ranks {shard_size} does not divide the {data_size} data ranks")
        return cls(
            num_stages=num_stages, data_size=data_size, tensor_size=tensor_size, shard_size=shard_size or data_size
        )

    @property
    def world_size(self) -> int:
        return self.num_stages * self.data_size * self.tensor_size

    def rank(self, *, stage: int, data_rank: int, tensor_rank: int) -> int:
        return (stage * self.data_size + data_rank) * self.tensor_size + tensor_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMesh:
    """This rank's position in the grid, and its groups.

    ``shard_mesh``: the data axis for FSDP, with one dimension, or two (replicas, shards) where weights are replicated.
    ``exchange_group``: attention's point-to-point traffic between the data ranks of a stage, on its own communicator
    and not FSDP's. ``forward_group``, ``backward_group``: the stages of one data rank, with one communicator per
    direction; None without stages. ``control_group``: all ranks, CPU-capable, for plans, digests and small sums.
    """

    shape: GridShape
    rank: int
    device: torch.device
    shard_mesh: DeviceMesh
    tensor_group: comm.Group
    exchange_group: comm.Group
    forward_group: comm.Group | None
    backward_group: comm.Group | None
    control_group: comm.Group

    @property
    def tensor_size(self) -> int:
        return self.shape.tensor_size

    @property
    def data_size(self) -> int:
        return self.shape.data_size

    @property
    def num_stages(self) -> int:
        return self.shape.num_stages

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def replica(self) -> int:
        """Which copy of the weights this rank holds a shard of: 0 for the first ``shard_size`` data ranks."""
        return self.data_rank // self.shape.shard_size


def build_mesh(shape: GridShape, *, rank: int, device: torch.device, timeout_s: float) -> RankMesh:
    """Make every group, in the same order on all ranks. Collective."""
    num_replicas = shape.data_size // shape.shard_size
    mesh = init_device_mesh(
        device.type, (shape.num_stages, num_replicas, shape.shard_size, shape.tensor_size),
        mesh_dim_names=("stage", "replica", "shard", "tensor"),
    )
    stages, tensors = range(shape.num_stages), range(shape.tensor_size)
    exchange = _own_group(
        [[shape.rank(stage=s, data_rank=d, tensor_rank=t) for d in range(shape.data_size)] for s in stages
         for t in tensors],
        rank, timeout_s,
    )
    if device.type == "cuda":
        comm.barrier(exchange)  # NCCL needs all ranks in a communicator's first call; later calls involve only pairs
    forward, backward = None, None
    if shape.num_stages > 1:
        columns = [
            [shape.rank(stage=s, data_rank=d, tensor_rank=t) for s in stages] for d in range(shape.data_size)
            for t in tensors
        ]
        forward, backward = (_own_group(columns, rank, timeout_s) for _ in range(2))
        if device.type == "cuda":
            comm.barrier(forward)
            comm.barrier(backward)
    return RankMesh(
        shape=shape,
        rank=rank,
        device=device,
        shard_mesh=mesh["shard"] if num_replicas == 1 else mesh["replica", "shard"],
        tensor_group=mesh["tensor"].get_group(),
        exchange_group=exchange,
        forward_group=forward,
        backward_group=backward,
        control_group=comm.new_group(list(range(shape.world_size)), timeout_s=timeout_s, backend="gloo"),
    )


def _own_group(rank_lists: list[list[int]], rank: int, timeout_s: float) -> comm.Group:
    """Make one group per list, in order, as all ranks must; return the group that contains ``rank``."""
    own: comm.Group | None = None
    for ranks in rank_lists:
        group = comm.new_group(ranks, timeout_s=timeout_s)
        if rank in ranks:
            own = group
    if own is None:
        raise SpecError(f"rank {rank} is in none of the groups {rank_lists}")
    return own
