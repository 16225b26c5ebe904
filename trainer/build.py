"""Makes and connects all objects of one rank."""

from __future__ import annotations

import dataclasses
import warnings

import torch

from memory.activations import ActivationMemory
from memory.peak import PeakMemory, map_large_blocks
from parallel import comm
from parallel.comm import GroupExchange
from parallel.engine import AttentionEngine
from parallel.kernel import choose_kernel
from parallel.mesh import GridShape, RankMesh, build_mesh
from parallel.sharding import shard_model
from parallel.stages import StageLink
from parallel.timing import StepClock, TimedExchange
from planner.errors import SpecError
from planner.inputs.model import ModelSpec
from planner.plan import Sharding
from trainer.model.initialize import initialize_weights
from trainer.model.optimizer import ShardedAdamW
from trainer.model.transformer import Decoder, StageShard, TensorShard
from trainer.prices.chunk_tier import chunk_memory
from trainer.prices.cost_source import memory_may_bind, own_budget_bytes
from trainer.prices.tier_setup import make_memory
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig
from trainer.step.chunk_policy import chunk_policy
from trainer.step.runtime import Runtime
from trainer.step.static_plan import make_arena

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(config: TrainConfig, env: RankEnv) -> torch.device:
    """This rank's device. Raises SpecError if CUDA is requested and there are too few devices."""
    num_devices = torch.cuda.device_count() if config.run.device != "cpu" else 0
    if num_devices >= env.local_world_size:
        torch.cuda.set_device(env.local_rank)
        return torch.device("cuda", env.local_rank)
    if config.run.device == "cuda":
        raise SpecError(
            f"--run.device cuda: this node has {num_devices} CUDA devices for {env.local_world_size} ranks; "
            "lower --world-size or use --run.device cpu"
        )
    return torch.device("cpu")


def build_runtime(
    config: TrainConfig, env: RankEnv, spec: ModelSpec, *, init_method: str = "env://"
) -> Runtime:
    """Join the process group and make mesh, model, attention engine and optimizer. Collective.

    Raises SpecError before any communication if this device cannot run the requested dtype, and the errors of
    ``trainer.prices.tier_setup`` if there is no room for swapped activations.
    """
    arena = make_arena(config, env)  # before a device is chosen, because that fixes CUDA's allocator
    device = pick_device(config, env)
    if device.type == "cpu":
        # before the first weight, so that resident memory is what tensors take; small blocks too where memory is tight
        # or plans may depend on its size
        budget_bytes = own_budget_bytes(config, device, env.local_world_size)
        plain = config.memory.policy in ("auto", "keep") and not config.memory.mlp_chunk_tokens
        map_large_blocks(fine=not plain or memory_may_bind(config, spec, budget_bytes))
    dtype = DTYPES[config.run.dtype]
    kernel = choose_kernel(device, dtype)
    timeout_s = config.run.collective_timeout_s
    parallel = config.parallel
    shape = GridShape.of(
        env.world_size, tensor_size=parallel.tensor_parallel, num_stages=parallel.pipeline_parallel,
        shard_size=parallel.shard_ranks,
    )
    comm.init_process_group(
        device=device, rank=env.rank, world_size=env.world_size, timeout_s=timeout_s, init_method=init_method
    )
    mesh = build_mesh(shape, rank=env.rank, device=device, timeout_s=timeout_s)
    sharding = Sharding(parallel.sharding)
    model = build_model(
        spec, mesh, seed=config.run.seed, compute_dtype=dtype, gradient_dtype=DTYPES[parallel.gradient_dtype],
        sharding=sharding, mlp_chunk_tokens=config.memory.mlp_chunk_tokens,
    )
    clock = StepClock(device)
    wire = TimedExchange(GroupExchange(mesh.exchange_group), clock)
    link = None
    if mesh.forward_group is not None and mesh.backward_group is not None:
        link = StageLink(
            stage=mesh.stage, num_stages=mesh.num_stages, device=device, dtype=dtype,
            forward_wire=TimedExchange(GroupExchange(mesh.forward_group), clock),
            backward_wire=TimedExchange(GroupExchange(mesh.backward_group), clock),
        )
    runtime = Runtime(
        mesh=mesh,
        model=model,
        engine=AttentionEngine(kernel, wire, device),
        link=link,
        optimizer=ShardedAdamW(model, config.optimizer, mesh),
        clock=clock,
        peak=PeakMemory(device, arena),
        memory=ActivationMemory(arena=arena),
        compute_dtype=dtype,
        sharding=sharding,
        chunking=chunk_policy(config, spec),
    )
    memory = chunk_memory(config, runtime, make_memory(config, runtime, env.local_world_size), env.local_world_size)
    return dataclasses.replace(runtime, memory=dataclasses.replace(memory, arena=arena))


def build_model(
    spec: ModelSpec, mesh: RankMesh, *, seed: int, compute_dtype: torch.dtype, gradient_dtype: torch.dtype,
    sharding: Sharding, mlp_chunk_tokens: int = 0,
) -> Decoder:
    """A sharded model with its initial weights on the mesh's device. Collective over the data axis."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns about every optional package it does not find
        model = Decoder(
            spec, TensorShard(mesh.tensor_rank, mesh.tensor_size, mesh.tensor_group),
            StageShard(mesh.stage, mesh.num_stages), mlp_chunk_tokens=mlp_chunk_tokens,
        )
    initialize_weights(model, seed=seed)
    model.to(mesh.device)
    shard_model(
        model, model.layers.values(), mesh.shard_mesh, compute_dtype=compute_dtype, gradient_dtype=gradient_dtype,
        sharding=sharding,
    )
    return model
