"""The launcher over real processes of torch's elastic agent; only the training inside each rank is replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import RankFailure, describe, exit_code_of, root_cause

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import dataclasses, sys
from launch import local
from trainer.settings.tree import TrainConfig, RunConfig
config = TrainConfig(run=RunConfig(dir=sys.argv[1], world_size=int(sys.argv[2])))
sys.exit(local.launch(config, worker_module="tests.launch.fake_rank"))
"""


def start(run_dir: Path, behaviour: str, *, world_size: int = 2) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "behaviour").write_text(behaviour)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(run_dir), str(world_size)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def finish(run_dir: Path, behaviour: str) -> tuple[int, str]:
    process = start(run_dir, behaviour)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def wait_for(paths: list[Path], *, limit_s: float = 40.0) -> None:
    stop_s = time.monotonic() + limit_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < stop_s, f"never appeared: {paths}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_good_run_returns_0_and_says_nothing(tmp_path: Path) -> None:
    code, errors = finish(tmp_path, "ok")
    assert (code, errors) == (0, "")
    assert "world_size: 2" in (tmp_path / "config.yaml").read_text()


def test_a_bug_in_one_rank_is_one_line_that_names_it(tmp_path: Path) -> None:
    code, errors = finish(tmp_path, "bug")
    assert code == 1
    assert errors.count("\n") == 1
    assert errors.startswith("longhaul: error: rank 1: RuntimeError: boom second line (traceback: ")
    trace = Path(errors.rstrip(")\n").rpartition("traceback: ")[2])
    assert "in behave" in trace.read_text()


def test_a_known_code_survives_the_launcher(tmp_path: Path) -> None:
    code, errors = finish(tmp_path, "numeric")
    assert (code, errors) == (95, "longhaul: error: rank 0: loss is not finite at step 7\n") or (
        code == 95 and "rank 1: loss is not finite at step 7" in errors and errors.count("\n") == 1
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_rank_is_named_and_not_the_peers_that_noticed(tmp_path: Path) -> None:
    code, errors = finish(tmp_path, "killed")
    assert code == 1
    assert errors.startswith("longhaul: error: rank 1: killed by SIGKILL (out of memory, or kill -9)")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "save")
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert f"longhaul: {number.name}: stopping after this step and saving" in errors
    assert errors.endswith(f"longhaul train {tmp_path / 'config.yaml'} --resume\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses the parent-death signal")
def test_a_second_interrupt_stops_at_once_and_leaves_no_rank(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf")
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert_ranks_end(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses the parent-death signal")
def test_a_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf")
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    process.kill()
    process.communicate(timeout=20)
    assert_ranks_end(tmp_path)


def assert_ranks_end(run_dir: Path) -> None:
    pids = [int((run_dir / f"pid-{rank}").read_text()) for rank in range(2)]
    stop_s = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < stop_s:
        time.sleep(0.05)
    alive = [pid for pid in pids if is_alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def failure(rank: int, exit_code: int, time_s: float = 100.0, message: str = "") -> RankFailure:
    return RankFailure(rank=rank, exit_code=exit_code, time_s=time_s, message=message)


def test_the_highest_known_code_wins() -> None:
    assert exit_code_of([failure(0, 75), failure(1, 95), failure(2, -15)], stopped_by=None) == 95
    assert exit_code_of([failure(0, 1), failure(1, -9)], stopped_by=None) == 1
    assert exit_code_of([], stopped_by=signal.SIGINT) == 130
    assert exit_code_of([failure(0, 75)], stopped_by=signal.SIGINT) == 75


def test_root_cause_looks_through_what_followed() -> None:
    agent_killed = failure(3, -9, time_s=131.0)
    assert root_cause([failure(0, -15), failure(2, 1, 100.5, "boom"), agent_killed]).rank == 2
    assert root_cause([failure(0, 1, 100.1, "closed by peer"), failure(1, -9, 101.0)]).rank == 1
    assert root_cause([failure(0, -6, 100.0), failure(1, 1, 100.2, "boom")]).rank == 1
    assert root_cause([failure(0, 1, 100.0, "closed by peer"), failure(1, 96, 100.2, "no checkpoint")]).rank == 1
    assert root_cause([]) is None


def test_describe_names_a_log_where_the_rank_left_no_reason() -> None:
    silent = RankFailure(rank=2, exit_code=1, time_s=0.0, message="", log_path=Path("logs/2/stderr.log"))
    assert describe(silent) == "rank 2: ended with exit code 1 (log: logs/2/stderr.log)"
