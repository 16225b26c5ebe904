"""Checkpoints of two real ranks: what is damaged is refused, what cannot be written is an error everywhere."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel import comm
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import CheckpointError, LonghaulError
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind
from planner.step_planner import plan_step
from tests.planner.step_cases import make_cost
from tests.plans import step_problem
from tests.ranks import RankPool
from trainer.build import build_runtime
from trainer.checkpoint import tensors as checkpoint
from trainer.checkpoint.manifests import (
    CHECKPOINTS,
    MANIFEST,
    check_same_run,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    run_identity,
    verify_checkpoint,
)
from trainer.checkpoint.tensors import TrainingState, choose_checkpoint, load_tensors, save_checkpoint, weights_digest
from trainer.data.batch import token_rows
from trainer.rank_env import RankEnv
from trainer.settings.tree import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from trainer.step.one_step import compile_stage_program, train_step
from trainer.step.runtime import Runtime

SPEC = ModelSpec(
    name="test", num_layers=1, hidden_dim=16, ffn_dim=16, num_query_heads=2, num_kv_heads=2, head_dim=8, vocab_size=31
)
CONFIG = TrainConfig(run=RunConfig(seed=3, collective_timeout_s=60), optimizer=OptimizerConfig(lr=1e-2))
LENGTHS = (40, 17, 9, 5)
STEP_1, STEP_2 = "step-00000001", "step-00000002"


def start(rank: int, world_size: int, init_method: str) -> Runtime:
    env = RankEnv(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    return build_runtime(CONFIG, env, SPEC, init_method=init_method)


def train(runtime: Runtime, step: int) -> None:
    size = runtime.mesh.data_size
    cost: CostModel = make_cost(size)
    limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=2, kinds=(AttentionKind.ULYSSES,))
    plan = plan_step(step_problem(LENGTHS, size, cost, limits), step=step, strategy="static", degree=1)
    documents = [torch.arange(length + 1).add(step).remainder(SPEC.vocab_size).numpy() for length in LENGTHS]

    def read(spans):
        ids = [documents[span.sequence][span.start_token : span.stop_token + 1] for span in spans]
        return token_rows(ids, spans, torch.device("cpu"))

    train_step(runtime, compile_stage_program(runtime, plan), read, num_tokens=plan.num_tokens, lr=0.01)


def state_of(next_step: int) -> TrainingState:
    return TrainingState(next_step=next_step, ledger={"step": next_step}, run=run_identity(CONFIG, SPEC))


def train_and_save(rank: int, world_size: int, init_method: str, folder: Path) -> list[str]:
    """Hash of the weights after steps 1, 2 and 3; checkpoints after 1 and 2."""
    runtime = start(rank, world_size, init_method)
    hashes = []
    for step in range(3):
        train(runtime, step)
        hashes.append(weights_digest(runtime))
        torch.manual_seed(100 + 10 * step + rank)
        if step < 2:
            save_checkpoint(runtime, folder, state_of(step + 1), keep=2)
    return hashes


def load_and_train(rank: int, world_size: int, init_method: str, folder: Path) -> Any:
    """From the newest whole checkpoint: its name, what was passed over, hashes of the weights loaded and one step on,
    and whether the random state is the saving rank's; or the error."""
    runtime = start(rank, world_size, init_method)
    torch.manual_seed(1)
    try:
        path, manifest, complaints = choose_checkpoint(runtime.mesh, folder)
    except CheckpointError as error:
        return str(error)
    load_tensors(runtime, path, manifest)
    random_state, loaded = torch.get_rng_state(), weights_digest(runtime)
    torch.manual_seed(100 + 10 * (manifest["next_step"] - 1) + rank)
    same_random_state = torch.equal(random_state, torch.get_rng_state())
    train(runtime, manifest["next_step"])
    return path.name, complaints, loaded, weights_digest(runtime), same_random_state


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@dataclasses.dataclass(frozen=True)
class Saved:
    folder: Path
    hashes: list[str]


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("run") / CHECKPOINTS
    hashes, same = pool.run(train_and_save, folder)
    assert hashes == same
    assert len(set(hashes)) == 3
    return Saved(folder, hashes)


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the two checkpoints, to be damaged."""
    return Path(shutil.copytree(saved.folder, tmp_path / CHECKPOINTS))


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_holds_all_that_the_next_step_needs(pool: RankPool, saved: Saved) -> None:
    files = sorted(path.name for path in (saved.folder / STEP_2).iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", MANIFEST]
    for answer in pool.run(load_and_train, saved.folder):
        assert answer == (STEP_2, [], saved.hashes[1], saved.hashes[2], True)


def test_another_number_of_data_ranks_loads_the_same_weights(pool: RankPool, saved: Saved) -> None:
    ((name, complaints, loaded, _, same_random_state),) = pool.run(load_and_train, saved.folder, world_size=1)
    assert (name, complaints, loaded) == (STEP_2, [], saved.hashes[1])
    assert not same_random_state


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(pool: RankPool, saved: Saved, copy: Path) -> None:
    flip_bit(copy / STEP_2 / "__1_0.distcp", 1000)
    line = f"{copy / STEP_2}: __1_0.distcp is missing, cut short or damaged"
    for answer in pool.run(load_and_train, copy):
        assert answer == (STEP_1, [line], saved.hashes[0], saved.hashes[1], True)
    flip_bit(copy / STEP_1 / ".metadata", 0)
    first, second = pool.run(load_and_train, copy)
    assert first == second
    assert first.startswith(f"no loadable checkpoint in {copy} ({line}; {copy / STEP_1}: .metadata is missing")


def flip_bit(file: Path, position: int) -> None:
    """Turn over one bit, counted from the start of the file (from its end where negative)."""
    data = bytearray(file.read_bytes())
    place, bit = divmod(position % (8 * len(data)), 8)
    data[place] ^= 1 << bit
    file.write_bytes(data)


FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata")
DAMAGE: dict[str, Callable[[Path], object]] = {
    "first bit": lambda file: flip_bit(file, 0),
    "a bit in the middle": lambda file: flip_bit(file, 4 * file.stat().st_size),
    "last bit": lambda file: flip_bit(file, -1),
    "cut by a byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut to nothing": lambda file: file.write_bytes(b""),
    "a byte too many": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_a_file_is_seen(copy: Path, name: str, damage: str) -> None:
    DAMAGE[damage](copy / STEP_2 / name)
    path, manifest, complaints = newest_checkpoint(copy)
    assert (path, manifest["next_step"]) == (copy / STEP_1, 1)
    assert complaints == [f"{copy / STEP_2}: {name} is missing, cut short or damaged"]


def test_any_bit_of_the_manifest_counts(copy: Path) -> None:
    file = copy / STEP_2 / MANIFEST
    original, wanted = file.read_bytes(), read_manifest(copy / STEP_2)
    for position in range(0, 8 * len(original), 11):  # each bit of a byte in turn
        flip_bit(file, position)
        try:
            same = read_manifest(copy / STEP_2) == wanted  # 1e-8 as 1E-8 is still itself
        except CheckpointError as error:
            assert str(error).startswith(f"{copy / STEP_2}: {MANIFEST} is ")
            assert "\n" not in str(error)
            same = True
        assert same, position
        file.write_bytes(original)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_manifest_cut_short_is_passed_over(copy: Path, share: float) -> None:
    file = copy / STEP_2 / MANIFEST
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    path, _, (complaint,) = newest_checkpoint(copy)
    assert path == copy / STEP_1
    assert complaint.startswith(f"{copy / STEP_2}: {MANIFEST} is cut short or damaged")


def test_what_is_not_published_is_no_checkpoint(copy: Path) -> None:
    shutil.copytree(copy / STEP_2, copy / "step-00000009.tmp")
    shutil.copytree(copy / STEP_2, copy / "step-00000008")
    (copy / "step-00000008" / MANIFEST).unlink()
    (copy / "step-00000007").write_text("a file")
    assert [path.name for path in list_checkpoints(copy)] == [STEP_1, STEP_2]
    assert newest_checkpoint(copy)[0] == copy / STEP_2


def test_nothing_loadable_ends_with_96(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no loadable checkpoint in .*start without --resume") as caught:
        newest_checkpoint(tmp_path / "nowhere")
    assert caught.value.exit_code == 96


@pytest.mark.parametrize(
    ("config", "spec", "text"),
    [
        (dataclasses.replace(CONFIG, run=RunConfig(seed=4)), SPEC, "run.seed 3, this run has 4:"),
        (CONFIG, dataclasses.replace(SPEC, num_layers=2), "model.num_layers 1, this run has 2:"),
        (CONFIG, dataclasses.replace(SPEC, vocab_size=32), "model.vocab_size 31, this run has 32:"),
        (
            dataclasses.replace(CONFIG, parallel=ParallelConfig(tensor_parallel=2)), SPEC,
            "parallel.tensor_parallel 1, this run has 2:",
        ),
        (dataclasses.replace(CONFIG, optimizer=OptimizerConfig(lr=1.0)), SPEC, "optimizer.lr 0.01, this run has 1.0:"),
    ],
)
def test_another_run_is_refused_by_the_setting(saved: Saved, config: TrainConfig, spec: ModelSpec, text: str) -> None:
    path, manifest, _ = newest_checkpoint(saved.folder)
    check_same_run(path, manifest["run"], run_identity(CONFIG, SPEC))
    with pytest.raises(CheckpointError) as caught:
        check_same_run(path, manifest["run"], run_identity(config, spec))
    assert str(caught.value).startswith(f"{path} was saved with {text} resume with the same setting")


def fail_then_save(rank: int, world_size: int, init_method: str, folder: Path, trouble: str) -> tuple[str, list[str]]:
    """The error of a save that goes wrong on one rank, and the checkpoints after a second save that goes well."""
    runtime = start(rank, world_size, init_method)
    train(runtime, 0)
    full_rank, target, name = TROUBLE[trouble]
    full = mock.patch.object(target, name, side_effect=OSError(errno.ENOSPC, "No space left on device"))
    message = ""
    with full if rank == full_rank else nullcontext():
        try:
            save_checkpoint(runtime, folder, state_of(3), keep=2)
        except LonghaulError as error:
            message = str(error)
    comm.barrier(runtime.mesh.control_group)  # rank 0 has cleared away what was half written
    left = sorted(path.name for path in folder.iterdir())
    comm.barrier(runtime.mesh.control_group)
    save_checkpoint(runtime, folder, state_of(3), keep=2)
    return message, left


TROUBLE: dict[str, tuple[int, Any, str]] = {  # the rank whose disk is full, and where it notices
    "rank 1 writes its tensors": (1, os, "fsync"),
    "rank 0 writes its tensors": (0, os, "fsync"),
    "rank 1 reads what it wrote": (1, checkpoint, "file_sha256"),
    "rank 0 writes the manifest": (0, checkpoint, "write_manifest"),
    "rank 0 makes the folder": (0, checkpoint, "_make_folder"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_save_that_fails_on_one_rank_fails_on_all(pool: RankPool, copy: Path, trouble: str) -> None:
    before = content_of(copy / STEP_2)
    answers = pool.run(fail_then_save, copy, trouble)
    assert answers[0] == answers[1]
    message, folders = answers[0]
    reason = f"{trouble[:6]}: [Errno {errno.ENOSPC}] No space left on device"
    wanted = f"checkpoint {copy / 'step-00000003'} could not be written ({reason}); older ones are untouched"
    assert message == wanted
    assert folders == [STEP_1, STEP_2]
    assert [path.name for path in list_checkpoints(copy)] == [STEP_2, "step-00000003"]
    assert content_of(copy / STEP_2) == before
    verify_checkpoint(copy / "step-00000003")


def save_where_a_file_is(rank: int, world_size: int, init_method: str, folder: Path) -> str:
    runtime = start(rank, world_size, init_method)
    with pytest.raises(LonghaulError) as caught:
        save_checkpoint(runtime, folder, state_of(1), keep=2)
    return str(caught.value)


def test_a_folder_that_is_a_file_is_named(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / CHECKPOINTS
    folder.write_text("")
    first, second = pool.run(save_where_a_file_is, folder)
    assert first == second
    assert "rank 0: Not a directory: " in first
    assert str(folder) in first


def test_old_checkpoints_go_after_the_new_one_is_there(pool: RankPool, saved: Saved, copy: Path) -> None:
    manifest = json.loads((copy / STEP_2 / MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES)
    (copy / "step-00000003.tmp").mkdir()
    (copy / "step-00000003.tmp" / "left over").write_text("by a killed run")
    pool.run(save_third, copy)
    assert sorted(path.name for path in copy.iterdir()) == ["step-00000003"]
    assert not (copy / "step-00000003" / "left over").exists()


def save_third(rank: int, world_size: int, init_method: str, folder: Path) -> None:
    save_checkpoint(start(rank, world_size, init_method), folder, state_of(3), keep=1)
