"""Runs that swap to disk and meet a fault: a killed rank, a lost file, a full disk. All ranks end, one line says why,
and nothing is left behind. By day with one rank, nightly with two; ``tests/memory`` has a memory cap, and failed reads
and writes of the tier alone."""

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
    "--memory", "swap", "--swap-fraction", "0.5", "--tier", "disk", "--model.num-layers", "4",
    "--steps", "20000", "--checkpoint-every", "0", "--plan.device-budget", "80 B",
)

WORLD_SIZES = [1, pytest.param(2, marks=pytest.mark.nightly)]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds the ranks and their files in /proc"
)


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


def open_swap_files(pid: int) -> list[int]:
    """Descriptors of our own to the process's swap files. Cutting through ``/proc/PID/fd/N`` instead would hit
    whatever the process opens under that number later: seen to empty source files that a traceback was read from."""
    found = []
    for link in swap_files(pid):
        descriptor = os.open(link, os.O_RDWR)
        if ".swap" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            found.append(descriptor)
        else:
            os.close(descriptor)
    return found


def assert_one_line(errors: str, *words: str) -> None:
    assert errors.count("\n") == 1 and errors.startswith("longhaul: error: "), errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_killed_rank_ends_the_run_and_leaves_no_file(work: Path, world_size: int) -> None:
    run = Run(work, work / f"killed-{world_size}", *SWAP, "--world-size", str(world_size))
    run.wait_for_step(1)
    processes = descendants(run.process.pid)
    victim = rank_process(run.process.pid, world_size - 1)
    assert swap_files(victim), "the rank swaps"
    os.kill(victim, signal.SIGKILL)
    done = run.finish()
    assert done.code == 1
    assert_one_line(done.errors, f"rank {world_size - 1}: killed by SIGKILL")
    assert_all_end(processes)
    assert list((done.folder / "swap").iterdir()) == []


@pytest.mark.nightly
def test_a_file_that_lost_its_data_is_an_error_that_names_it(work: Path) -> None:
    run = Run(work, work / "lost", *SWAP, "--world-size", "2")
    run.wait_for_step(1)
    processes = descendants(run.process.pid)
    files = open_swap_files(rank_process(run.process.pid, 1))
    assert files, "the rank swaps"
    stop_s = time.monotonic() + LIMIT_S
    while run.process.poll() is None and time.monotonic() < stop_s:
        for file in files:  # until a cut falls between a store and its load
            os.ftruncate(file, 0)
        time.sleep(0.001)  # the run needs the processors, too
    for file in files:
        os.close(file)
    done = run.finish()
    assert done.code == 1
    assert_one_line(done.errors, "rank 1: disk tier ", "swap/rank-1.swap: read at byte ", "bytes too early")
    assert_all_end(processes)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_room_for_the_file_ends_every_rank_before_the_first_step(work: Path, world_size: int) -> None:
    folder, ranks = work / f"full-{world_size}", ("--world-size", str(world_size))
    process = subprocess.run(
        [sys.executable, "-m", "launch.cli", *train_arguments(work, folder, *SWAP, *ranks)],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18)),
    )
    assert process.returncode == 94, process.stderr
    assert_one_line(process.stderr, ".swap: cannot reserve ", "File too large", "smaller")
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()
