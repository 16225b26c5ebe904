"""Checkpoints that are complete or absent: model, optimizer, RNG and data position, through torch's DCP.

Protocol: everything is written to ``step-N.tmp``; each rank hashes its own file; rank 0 writes ``manifest.json`` with
sizes and SHA-256 of all files, syncs it, and renames the folder to ``step-N``. Only a folder whose manifest verifies
is ever loaded: DCP itself has no checksum, and its ``.metadata`` is a pickle, so it is hashed before it is read.
Old checkpoints are deleted only after the new one is published. State that is not a tensor is JSON in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from parallel import comm
from parallel.mesh import RankMesh
from planner.errors import CheckpointError, LonghaulError
from trainer.checkpoint.manifests import FORMAT, file_sha256, list_checkpoints, newest_checkpoint, write_manifest
from trainer.model.optimizer import local_shard
from trainer.step.runtime import Runtime

T = TypeVar("T")
_NO_FILE = "-" * 64
_REASON_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The state of training in plain values. ``next_step``: the first step not yet done. ``run``: the ``run_identity``
    that a run must share to resume from the checkpoint (model, data, seed, tensor parallelism)."""

    next_step: int
    ledger: dict[str, Any]
    run: dict[str, Any]


def save_checkpoint(runtime: Runtime, folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Write ``folder/step-N`` and delete all but the newest ``keep``. Collective; blocks on the disk.

    Raises LonghaulError on every rank if any rank could not write; the older checkpoints are then untouched.
    """
    mesh = runtime.mesh
    final = folder / f"step-{state.next_step:08d}"
    partial = final.with_name(final.name + ".tmp")
    own = partial / f"__{mesh.rank}_0.distcp"
    try:
        _together(mesh, lambda: _make_folder(partial) if mesh.rank == 0 else None)
        _together(mesh, lambda: _write_tensors(runtime, partial))
        digest = _together(mesh, lambda: file_sha256(own) if own.exists() else _NO_FILE)
        digests = [part.decode() for part in comm.all_gather_bytes(digest.encode(), mesh.control_group)]
        _together(mesh, lambda: _publish(partial, final, digests, state) if mesh.rank == 0 else None)
    except _NotWritten as error:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise LonghaulError(f"checkpoint {final} could not be written ({error}); older ones are untouched") from None
    if mesh.rank == 0:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # failing to delete is no reason to stop training
    return final


class _NotWritten(Exception):
    """Some rank could not write; raised on all ranks. The text says which rank and why."""


def _together(mesh: RankMesh, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank. If the disk fails one rank, all raise _NotWritten, so that no rank waits for one that
    stopped. Collective."""
    reason, result = "", None
    try:
        result = work()
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    text = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
    reasons = [part.decode(errors="ignore").strip() for part in comm.all_gather_bytes(text, mesh.control_group)]
    if any(reasons):
        raise _NotWritten("; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))
    return cast(T, result)


def _make_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(runtime: Runtime, partial: Path) -> None:
    """Raises OSError if this rank could not write; failures of other ranks are reported there."""
    writer = dcp.FileSystemWriter(partial, sync_files=True)
    try:
        dcp.save(_tensors(runtime), storage_writer=writer, process_group=runtime.mesh.control_group)
    except CheckpointException as error:  # raised on every rank, with the failures of all ranks
        own = error.failures.get(runtime.mesh.rank)
        if own is not None:
            raise OSError(str(own[0])) from None


def _publish(partial: Path, final: Path, digests: list[str], state: TrainingState) -> None:
    by_name = {f"__{rank}_0.distcp": digest for rank, digest in enumerate(digests)}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": by_name.get(path.name) or file_sha256(path)}
        for path in sorted(partial.iterdir())
    }
    manifest = {
        "format": FORMAT, "files": files, "next_step": state.next_step, "ledger": state.ledger,
        "run": state.run, "torch": torch.__version__, "world_size": len(digests),
    }
    write_manifest(partial, manifest)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def choose_checkpoint(mesh: RankMesh, folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """``newest_checkpoint`` as rank 0 sees it, on every rank. Collective. Raises CheckpointError on all ranks."""
    payload = None
    if mesh.rank == 0:
        try:
            path, manifest, complaints = newest_checkpoint(folder)
            payload = json.dumps([path.name, manifest, complaints]).encode()
        except CheckpointError as error:
            payload = json.dumps([str(error)]).encode()
    found = json.loads(comm.broadcast_bytes(payload, source=0, group=mesh.control_group))
    if len(found) == 1:
        raise CheckpointError(found[0])
    name, manifest, complaints = found
    return folder / name, manifest, complaints


def load_tensors(runtime: Runtime, path: Path, manifest: dict[str, Any]) -> None:
    """Load model, optimizer and (at the same world size) RNG from a verified checkpoint. Collective.

    The number of data ranks may differ from that of the saving run: DCP reshards.
    """
    runtime.optimizer.materialize_state()
    same_world = manifest["world_size"] == runtime.mesh.world_size
    tensors = _tensors(runtime, with_rng=same_world)
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), process_group=runtime.mesh.control_group)
    if same_world:
        torch.set_rng_state(tensors[f"rng.{runtime.mesh.rank}"])
    for shard in runtime.optimizer.named_shards.values():
        runtime.optimizer.adamw.state[shard]["step"].fill_(manifest["next_step"])


def _tensors(runtime: Runtime, *, with_rng: bool = True) -> dict[str, Any]:
    """Everything DCP stores, by key. Keys carry the tensor rank, whose slices would otherwise share one name."""
    runtime.optimizer.materialize_state()
    prefix = f"tensor{runtime.mesh.tensor_rank}"
    tensors: dict[str, Any] = {f"rng.{runtime.mesh.rank}": torch.get_rng_state()} if with_rng else {}
    for name, parameter in runtime.model.named_parameters():
        tensors[f"{prefix}.model.{name}"] = parameter.detach()
        moments = runtime.optimizer.adamw.state[runtime.optimizer.named_shards[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{prefix}.{key}.{name}"] = _like(moments[key], parameter.detach())
    return tensors


def _like(local: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """``local`` as the local shard of a DTensor with the layout of ``sharded``."""
    if not isinstance(sharded, DTensor):
        return local
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


def weights_digest(runtime: Runtime) -> str:
    """sha256 over all full weights, equal on all data ranks and stages of a tensor rank. Collective over all ranks."""
    total = hashlib.sha256()
    for name, parameter in sorted(runtime.model.named_parameters()):
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else local_shard(parameter)
        total.update(name.encode())
        total.update(full.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mesh = runtime.mesh
    if mesh.num_stages == 1:
        return total.hexdigest()
    parts = comm.all_gather_bytes(total.digest(), mesh.control_group)
    stages = [mesh.shape.rank(stage=stage, data_rank=0, tensor_rank=mesh.tensor_rank)
              for stage in range(mesh.num_stages)]
    return hashlib.sha256(b"".join(parts[rank] for rank in stages)).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
