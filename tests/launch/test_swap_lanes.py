"""A run that swaps to a disk records its copies; ``longhaul report`` shows them beside the layers they hide behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from planner.measured.copy_times import BACK, LANES, LAYERS, OUT, WAIT
from planner.pages.step_trace import LANES_PER_RANK, MEASURED
from planner.units import MIB
from tests.launch.tiny_run import train_arguments, write_corpus, write_cost
from tests.planner.pages.trace_rules import check_trace, place_of

ROOT = Path(__file__).resolve().parents[2]
NUM_LAYERS, NUM_RANKS = 6, 2
FLAGS = (
    "--memory", "swap", "--tier", "disk", "--swap-fraction", "0.5", "--world-size", str(NUM_RANKS), "--steps", "3",
    "--model.num-layers", str(NUM_LAYERS), "--model.hidden-dim", "128", "--model.ffn-dim", "256", "--max-length", "120",
    "--tokens-per-step", "2048",
)


def train(work: Path, name: str, *flags: str) -> Path:
    arguments = train_arguments(work, work / name, *FLAGS, *flags)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return work / name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lanes")
    write_corpus(folder / "corpus")
    write_cost(folder / "cost.json")
    return folder


@pytest.fixture(scope="module")
def run_dir(work: Path) -> Path:
    return train(work, "run")


def test_copies_run_beside_layers_in_the_trace(run_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert cli.main(["report", str(run_dir), "--trace", str(trace)]) == 0
    value = json.loads(trace.read_text())
    check_trace(value)
    lanes: dict[tuple[int, str], list[tuple[float, float]]] = {}
    microbatches: list[tuple[int, float, float]] = []
    for event in value["traceEvents"]:
        if event["ph"] != "X" or place_of(event)[0] != MEASURED:
            continue
        rank, place = divmod(place_of(event)[1], LANES_PER_RANK)
        span = (event["ts"], event["ts"] + event["dur"])
        if place:
            lanes.setdefault((rank, LANES[place - 1]), []).append(span)
        elif event["cat"] == "microbatch":
            microbatches.append((rank, *span))
    assert set(lanes) == {(rank, lane) for rank in range(NUM_RANKS) for lane in (LAYERS, OUT, BACK, WAIT)}
    for rank in range(NUM_RANKS):
        for lane in (OUT, BACK):
            beside = [
                (copy, layer) for copy in lanes[rank, lane] for layer in lanes[rank, LAYERS]
                if copy[0] < layer[1] and layer[0] < copy[1]
            ]
            assert beside, f"no copy {lane} of rank {rank} ran beside a layer"
    for (rank, lane), spans in lanes.items():
        for start, stop in spans if lane == LAYERS else ():
            assert any(
                rank == owner and first - 2 <= start and stop <= last + 2 for owner, first, last in microbatches
            ), "layers lie in the microbatch that clocks saw, but for rounded microseconds"


def test_the_report_says_how_much_was_hidden(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, values = tmp_path / "page.html", tmp_path / "report.json"
    assert cli.main(["report", str(run_dir), "--html", str(page), "--json", str(values)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("copies of activations")]
    assert "of it hidden behind layers" in line and "means of 2 ranks, 3 steps" in line and "waited for copies" in line
    assert "copies of activations" in page.read_text()
    found = json.loads(values.read_text())["copies"]
    assert found["out_bytes"] == found["back_bytes"] > MIB and 0 < found["hidden_s"] <= found["copy_s"]
    recorded = [json.loads(text)["step"] for text in (run_dir / "lanes.jsonl").read_text().splitlines()]
    assert recorded == [0, 1, 2]


@pytest.mark.nightly
def test_nothing_is_recorded_where_it_is_switched_off_or_nothing_is_swapped(work: Path, run_dir: Path) -> None:
    off = train(work, "off", "--metrics.spans-every", "0")
    kept = train(work, "kept", "--memory", "keep", "--tier", "null", "--swap-fraction", "null")
    assert not (off / "lanes.jsonl").exists() and not (kept / "lanes.jsonl").exists()
    digests = [json.loads((run / "summary.json").read_text())["weights_sha256"] for run in (off, run_dir)]
    assert digests[0] == digests[1], "recording changes no bit"
