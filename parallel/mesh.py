"""The grid of ranks: data axis x tensor axis. Groups are made here, once, and passed as arguments from then on.

Global rank = data_rank * tensor_size + tensor_rank, so a tensor-parallel group is a run of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel import comm
from planner.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMesh:
    """This rank's place and its groups.

    ``exchange_group``: attention's point-to-point traffic over the data axis, apart from FSDP's communicator.
    ``control_group``: CPU-capable, all ranks: plans, digests, small sums.
    """

    rank: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    device: torch.device
    data_mesh: DeviceMesh
    tensor_group: comm.Group
    exchange_group: comm.Group
    control_group: comm.Group

    @property
    def world_size(self) -> int:
        return self.data_size * self.tensor_size


def build_mesh(*, rank: int, world_size: int, tensor_size: int, device: torch.device, timeout_s: float) -> RankMesh:
    """Make every group, in one order on all ranks. Collective. Raises SpecError if the grid does not fit."""
    if world_size % tensor_size:
        raise SpecError(f"--tensor-parallel {tensor_size} does not divide the world size {world_size}")
    data_size = world_size // tensor_size
    mesh = init_device_mesh(device.type, (data_size, tensor_size), mesh_dim_names=("data", "tensor"))
    exchange: comm.Group | None = None
    for tensor_rank in range(tensor_size):
        ranks = [data_rank * tensor_size + tensor_rank for data_rank in range(data_size)]
        group = comm.new_group(ranks, timeout_s=timeout_s)
        if rank in ranks:
            exchange = group
    if exchange is None:
        raise SpecError(f"rank {rank} is not in a grid of {data_size} x {tensor_size} ranks")
    if device.type == "cuda":
        comm.barrier(exchange)  # NCCL wants all ranks in a communicator's first call; later ones are pairs
    control = comm.new_group(list(range(world_size)), timeout_s=timeout_s, backend="gloo")
    return RankMesh(
        rank=rank,
        data_rank=rank // tensor_size,
        data_size=data_size,
        tensor_rank=rank % tensor_size,
        tensor_size=tensor_size,
        device=device,
        data_mesh=mesh["data"],
        tensor_group=mesh["tensor"].get_group(),
        exchange_group=exchange,
        control_group=control,
    )
