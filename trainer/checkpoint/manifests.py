"""Which checkpoints a run folder holds and which of them are complete: JSON and hashes, no torch.

A checkpoint is a folder ``step-N`` whose ``manifest.json`` records the size and SHA-256 of every other file, and its
own SHA-256, so that damage to the manifest is found too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from planner.codec import to_plain
from planner.errors import CheckpointError
from planner.inputs.model import ModelSpec
from planner.units import MIB
from trainer.settings.tree import TrainConfig

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""
MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK_BYTES = MIB


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first (not verified)."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and (path / MANIFEST).exists())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; its other files are not read. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
        if recorded != _digest(manifest):
            raise CheckpointError(f"{path}: {MANIFEST} is damaged")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is cut short or damaged ({type(error).__name__}: {error})") from None
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint in folder ``path`` and sync it to disk."""
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking size and hash of every file. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name, recorded in manifest["files"].items():
        file = path / name
        try:
            is_whole = file.stat().st_size == recorded["bytes"] and file_sha256(file) == recorded["sha256"]
        except OSError:
            is_whole = False
        if not is_whole:
            raise CheckpointError(f"{path}: {name} is missing, cut short or damaged")
    return manifest


def newest_checkpoint(folder: Path, *, verify: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies, its manifest, and one line for each newer one that was skipped.

    ``verify`` False: only the manifest is checked, which is quick however large the files are.
    Raises CheckpointError if there is none.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, verify_checkpoint(path) if verify else read_manifest(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    detail = f" ({'; '.join(complaints)})" if complaints else ""
    raise CheckpointError(
        f"no loadable checkpoint in {folder}{detail}; start without --resume or name another --run-dir"
    )


def run_identity(config: TrainConfig, spec: ModelSpec) -> dict[str, Any]:
    """Settings, by name, that must be equal in a checkpoint and in the run that resumes from it, so that the weights
    fit and the steps repeat."""
    model = {f"model.{key}": value for key, value in to_plain(spec).items() if key not in ("name", "source")}
    optimizer = {f"optimizer.{key}": value for key, value in to_plain(config.optimizer).items()}
    return {
        **model,
        "run.seed": config.run.seed,
        "run.steps": config.run.steps,
        "parallel.tensor_parallel": config.parallel.tensor_parallel,
        **optimizer,
    }


def check_same_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise CheckpointError naming the first setting in which this run differs from the one that saved."""
    for key, value in current.items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved with {key} {saved.get(key)}, this run has {value}: "
                "resume with the same setting or start in another --run-dir"
            )


def file_sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()
