"""``longhaul train`` in chunks: estimates are called estimates, and the tier of K/V is in the log and the metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.tiny_run import train_arguments, write_corpus, write_cost

ROOT = Path(__file__).resolve().parents[2]
ESTIMATE = "gradients are estimates (SpaCO, fraction 0.5, bernoulli sampling)"
CHUNKS_ON_DISK = ("--chunk-tokens", "8", "--tier", "disk")
Shown = tuple[str, list[dict[str, object]]]
"""What a run prints, and its lines of metrics.jsonl."""


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def train(folder: Path, name: str, *flags: str) -> Shown:
    arguments = train_arguments(folder, folder / name, "--steps", "2", "--checkpoint-every", "0", "--world-size", "2",
                                "--plan.device-budget", "40 B", *flags)
    done = launch(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    records = (folder / name / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in records]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chunked")
    write_corpus(folder / "corpus")
    write_cost(folder / "cost.json")
    return folder


@pytest.fixture(scope="module")
def spaco(work: Path) -> Shown:
    """A run in sampled chunks, their K/V in a tier."""
    return train(work, "spaco", "--memory", "spaco", *CHUNKS_ON_DISK, "--sample-fraction", "0.5")


def test_estimates_are_called_estimates(spaco: Shown) -> None:
    shown, records = spaco
    assert "chunks: 8 tokens per rank" in shown and shown.count(ESTIMATE) == 1
    assert [record["gradients"] for record in records] == [ESTIMATE] * 2


def test_keys_and_values_in_a_tier(spaco: Shown) -> None:
    assert_in_tier(spaco)


@pytest.mark.nightly
def test_exact_chunks_in_a_tier(work: Path) -> None:
    run = train(work, "seco", "--memory", "seco", *CHUNKS_ON_DISK)
    assert_in_tier(run)
    assert [record["gradients"] for record in run[1]] == ["exact"] * 2


def assert_in_tier(run: Shown) -> None:
    shown, records = run
    assert "memory: K/V and dK/dV of earlier chunks in a disk tier of" in shown
    for record in records:
        assert 0 < int(str(record["host_peak_bytes"])) <= int(str(record["predicted_host_bytes"]))


def test_a_tier_too_small_for_keys_and_values_is_refused(work: Path) -> None:
    small = launch(train_arguments(work, work / "small", "--steps", "1", "--world-size", "1", "--memory", "seco",
                                   *CHUNKS_ON_DISK, "--memory.tier-budget", "1 KiB"))
    assert small.returncode == 94, small.stdout + small.stderr
    assert small.stderr.startswith("longhaul: error: ") and small.stderr.count("\n") == 1
    assert "disk tier: need " in small.stderr and "have 1 KiB" in small.stderr
