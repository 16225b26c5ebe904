"""Checkpoints that are whole or absent: model, optimizer, RNG and data position, through torch's DCP.

Protocol: everything is written to ``step-N.tmp``; each rank hashes its own file; rank 0 writes ``manifest.json`` with
sizes and SHA-256 of all files, syncs it, and renames the folder to ``step-N``. Only a folder whose manifest verifies
is ever loaded: DCP itself has no checksum, and its ``.metadata`` is a pickle, so it is hashed before it is read.
Old checkpoints go only after the new one is published. Non-tensor state is JSON inside the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from parallel import comm
from planner.errors import CheckpointError, LonghaulError
from planner.units import MIB
from trainer.optimizer import local_shard
from trainer.step import Runtime

MANIFEST = "manifest.json"
FORMAT = 1
_NO_FILE = "-" * 64
_BLOCK_BYTES = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where training stands, in plain values. ``next_step``: the first step not yet done. ``run``: what a checkpoint
    must share with the run that resumes from it (model, data, seed, tensor parallelism)."""

    next_step: int
    ledger: dict[str, Any]
    run: dict[str, Any]


def save_checkpoint(runtime: Runtime, folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Write ``folder/step-N`` and delete all but the newest ``keep``. Collective; blocks on the disk.

    Raises LonghaulError on every rank if any rank could not write; the older checkpoints are then untouched.
    """
    group = runtime.mesh.control_group
    final = folder / f"step-{state.next_step:08d}"
    partial = final.with_name(final.name + ".tmp")
    if runtime.mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier(group)
    try:
        dcp.save(
            _tensors(runtime), storage_writer=dcp.FileSystemWriter(partial, sync_files=True), process_group=group
        )
    except CheckpointException as error:
        shutil.rmtree(partial, ignore_errors=True)
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in sorted(error.failures.items()))
        raise LonghaulError(f"checkpoint {final} could not be written ({reasons}); older ones are untouched") from None
    own = partial / f"__{runtime.mesh.rank}_0.distcp"
    digests = comm.all_gather_bytes((_sha256(own) if own.exists() else _NO_FILE).encode(), group)
    if runtime.mesh.rank == 0:
        _publish(partial, final, [digest.decode() for digest in digests], state)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    comm.barrier(group)
    return final


def _publish(partial: Path, final: Path, digests: list[str], state: TrainingState) -> None:
    by_name = {f"__{rank}_0.distcp": digest for rank, digest in enumerate(digests)}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": by_name.get(path.name) or _sha256(path)}
        for path in sorted(partial.iterdir())
    }
    manifest = {
        "format": FORMAT, "files": files, "next_step": state.next_step, "ledger": state.ledger,
        "run": state.run, "torch": torch.__version__, "world_size": len(digests),
    }
    path = partial / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first (not verified)."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and (path / MANIFEST).exists())


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has its recorded size and hash. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable manifest ({error})") from None
    for name, recorded in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != recorded["bytes"] or _sha256(file) != recorded["sha256"]:
            raise CheckpointError(f"{path}: {name} is missing, cut short or damaged")
    return manifest


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies, its manifest, and a line for each newer one that had to be passed over.

    Raises CheckpointError if there is none.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, verify_checkpoint(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    detail = f" ({'; '.join(complaints)})" if complaints else ""
    raise CheckpointError(
        f"no loadable checkpoint in {folder}{detail}; start without --resume or name another --run-dir"
    )


def check_same_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first setting in which this run differs from the one that saved."""
    for key, value in current.items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved with {key} = {saved.get(key)!r}, this run has {value!r}: "
                "resume with the same setting or start in another --run-dir"
            )


def load_tensors(runtime: Runtime, path: Path, manifest: dict[str, Any]) -> None:
    """Fill model, optimizer and (at the same world size) RNG from a verified checkpoint. Collective.

    The number of data ranks may differ from the saving run's: DCP reshards.
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
    """Everything DCP stores, by key. Tensor ranks hold different slices under one name, so keys carry the rank."""
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
    """``local`` as the shard of a tensor laid out like ``sharded``."""
    if not isinstance(sharded, DTensor):
        return local
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


def weights_digest(runtime: Runtime) -> str:
    """sha256 over all weights in full, equal on all ranks of a tensor rank. Collective over the data axis."""
    total = hashlib.sha256()
    for name, parameter in sorted(runtime.model.named_parameters()):
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else local_shard(parameter)
        total.update(name.encode())
        total.update(full.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
