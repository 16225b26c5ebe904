"""``longhaul train`` in chunks: estimates are called estimates, and the tier of K/V is in the log and the metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launch.tiny_run import train_arguments, write_corpus, write_cost

ROOT = Path(__file__).resolve().parents[2]
ESTIMATE = "gradients are estimates (SpaCO, fraction 0.5, bernoulli sampling)"


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def train(folder: Path, name: str, *flags: str) -> tuple[str, list[dict[str, object]]]:
    arguments = train_arguments(folder, folder / name, "--steps", "2", "--checkpoint-every", "0", "--world-size", "2",
                                "--plan.device-budget", "40 B", *flags)
    done = launch(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    records = (folder / name / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in records]


def test_estimates_are_called_estimates(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_cost(tmp_path / "cost.json")
    chunks = ("--chunk-tokens", "8")
    shown, records = train(tmp_path, "spaco", "--memory", "spaco", *chunks, "--sample-fraction", "0.5")
    assert "chunks: 8 tokens per rank" in shown and shown.count(ESTIMATE) == 1
    assert [record["gradients"] for record in records] == [ESTIMATE] * 2


def test_keys_and_values_in_a_tier(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_cost(tmp_path / "cost.json")
    seco = ("--memory", "seco", "--chunk-tokens", "8", "--tier", "disk")
    shown, records = train(tmp_path, "seco", *seco)
    assert "memory: K/V and dK/dV of earlier chunks in a disk tier of" in shown
    for record in records:
        assert 0 < int(str(record["host_peak_bytes"])) <= int(str(record["predicted_host_bytes"]))
    small = launch(train_arguments(tmp_path, tmp_path / "small", "--steps", "1", "--world-size", "1", *seco,
                                   "--memory.tier-budget", "1 KiB"))
    assert small.returncode == 94, small.stdout + small.stderr
    assert small.stderr.startswith("longhaul: error: ") and small.stderr.count("\n") == 1
    assert "disk tier: need " in small.stderr and "have 1 KiB" in small.stderr
