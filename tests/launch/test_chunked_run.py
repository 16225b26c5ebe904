"""``longhaul train --memory spaco``: the log and the metrics say that gradients are estimates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launch.tiny_run import train_arguments, write_corpus, write_cost

ROOT = Path(__file__).resolve().parents[2]
ESTIMATE = "gradients are estimates (SpaCO, fraction 0.5, bernoulli sampling)"


def train(folder: Path, name: str, *flags: str) -> tuple[str, list[dict[str, object]]]:
    arguments = train_arguments(folder, folder / name, "--steps", "2", "--checkpoint-every", "0", "--world-size", "2",
                                "--plan.device-budget", "40 B", *flags)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = (folder / name / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in records]


def test_estimates_are_called_estimates(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_cost(tmp_path / "cost.json")
    chunks = ("--chunk-tokens", "8")
    shown, records = train(tmp_path, "spaco", "--memory", "spaco", *chunks, "--sample-fraction", "0.5")
    assert "chunks: 8 tokens a rank" in shown and shown.count(ESTIMATE) == 1
    assert [record["gradients"] for record in records] == [ESTIMATE] * 2
