"""Runs that swap to disk and meet a fault: a killed rank, a lost file, a full disk. All ranks end, one line says why,
and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_train_end_to_end import LIMIT_S, Run, assert_all_end, descendants, rank_process
from tests.launch.tiny_run import train_arguments, write_corpus, write_cost

ROOT = Path(__file__).resolve().parents[2]
SWAP = (
    "--memory", "swap", "--swap-fraction", "0.5", "--tier", "disk", "--world-size", "2", "--model.num-layers", "4",
    "--steps", "20000", "--checkpoint-every", "0",
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks and their files in /proc"),
    pytest.mark.nightly,
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swap-faults")
    write_corpus(folder / "corpus")
    write_cost(folder / "cost.json")
    return folder


def swap_files(pid: int) -> list[Path]:
    """The process's open swap files: they have no name, /proc still reaches them."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if ".swap" in str(link.readlink()):
                found.append(link)
    return found


def assert_one_line(errors: str, *words: str) -> None:
    assert errors.count("\n") == 1 and errors.startswith("longhaul: error: "), errors
    for word in words:
        assert word in errors


def test_a_killed_rank_ends_the_run_and_leaves_no_file(work: Path) -> None:
    run = Run(work, work / "killed", *SWAP)
    run.wait_for_step(1)
    processes = descendants(run.process.pid)
    victim = rank_process(run.process.pid, 1)
    assert swap_files(victim), "the rank swaps"
    os.kill(victim, signal.SIGKILL)
    done = run.finish()
    assert done.code == 1
    assert_one_line(done.errors, "rank 1: killed by SIGKILL")
    assert_all_end(processes)
    assert list((done.folder / "swap").iterdir()) == []


def test_a_file_that_lost_its_data_is_an_error_that_names_it(work: Path) -> None:
    run = Run(work, work / "lost", *SWAP)
    run.wait_for_step(1)
    processes = descendants(run.process.pid)
    files = swap_files(rank_process(run.process.pid, 1))
    stop_s = time.monotonic() + LIMIT_S
    while run.process.poll() is None and time.monotonic() < stop_s:
        for file in files:  # until a cut falls between a store and its load
            with contextlib.suppress(OSError):
                os.truncate(file, 0)
    done = run.finish()
    assert done.code == 1
    assert_one_line(done.errors, "rank 1: disk tier ", "swap/rank-1.swap: read at byte ", "bytes too early")
    assert_all_end(processes)


def test_no_room_for_the_file_ends_every_rank_before_the_first_step(work: Path) -> None:
    folder = work / "full"
    process = subprocess.run(
        [sys.executable, "-m", "launch.cli", *train_arguments(work, folder, *SWAP, "--plan.device-budget", "40 B")],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18)),
    )
    assert process.returncode == 94, process.stderr
    assert_one_line(process.stderr, ".swap: cannot reserve ", "File too large", "smaller")
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()
