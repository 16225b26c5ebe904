"""``longhaul plan`` from flags to table and JSON: what it prints and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.plan_command import run
from launch.plan_output import fitting_columns
from planner.codec import to_plain
from planner.cost.data_sheet import derive_cost
from planner.inputs.files import load_cluster, load_model
from tests.launch.plan_cases import REPLAY_KEYS, STEP_KEYS, SUMMARY_KEYS, planned

ROOT = Path(__file__).parents[2]


def test_json_has_exactly_the_promised_keys(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--lengths", lengths, "--batch-sequences", "16", "--strategy", "static")
    assert set(result) == {"schema", "model", "cluster", "strategy", "steps", "summary"}
    assert (result["schema"], result["model"], result["cluster"]) == (1, "tiny", "laptop-cpu")
    assert result["strategy"] == "static" and set(result["summary"]) == SUMMARY_KEYS
    assert [step["num_sequences"] for step in result["steps"]] == [16, 16, 8]
    sizes = [int(line) for line in Path(lengths).read_text().split()]
    assert [step["num_tokens"] for step in result["steps"]] == [sum(sizes[:16]), sum(sizes[16:32]), sum(sizes[32:])]
    for index, step in enumerate(result["steps"]):
        assert set(step) == {*STEP_KEYS, "replay"} and step["step"] == index
        replay = step["replay"]
        parts = ("compute_s", "exposed_communication_s", "exposed_swap_s", "idle_s")
        assert set(replay) == REPLAY_KEYS and replay["low_s"] < replay["step_s"] < replay["high_s"]
        assert sum(replay[part] for part in parts) == pytest.approx(replay["step_s"])
        assert replay["peak_bytes"] == step["peak_bytes"] and 0 < replay["mfu"] < 1
        assert 0 <= step["bound_s"] <= step["predicted_s"] * (1 + 1e-9) and 0 <= step["gap"] <= 1
        assert 0 <= step["idle_fraction"] < 1 and step["peak_bytes"] <= 2 * 2**30
    seconds = [step["predicted_s"] for step in result["steps"]]
    summary = result["summary"]
    assert summary["mean_step_s"] == pytest.approx(sum(seconds) / 3)
    assert summary["tokens_per_s"] == pytest.approx(sum(sizes) / sum(seconds))
    assert summary["tokens_per_s_per_device"] == pytest.approx(summary["tokens_per_s"] / 4)


def test_same_inputs_same_plan(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--lengths", lengths, "--batch-sequences", "10", "--steps", "1", "--strategy", "static")
    first, second = planned(capsys, *arguments), planned(capsys, *arguments)
    for result in (first, second):
        result["steps"][0].pop("solve_s")
        result["summary"].pop("mean_solve_s")
    assert first == second


def test_adaptive_is_the_default_and_no_worse_than_any_static_degree(
    lengths: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "1", "--attention", "ulysses")
    adaptive = planned(capsys, *common)
    assert adaptive["strategy"] == "adaptive"
    static = [planned(capsys, *common, "--strategy", "static", "--degree", degree) for degree in ("1", "2", "4")]
    times = [result["steps"][0]["predicted_s"] for result in static]
    assert adaptive["steps"][0]["predicted_s"] <= min(times) * (1 + 1e-9) and min(times) < max(times)


def test_table_for_people(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lengths", lengths, "--batch-tokens", "4K", "--steps", "2", "--strategy", "static", "--degree", "2",
                "--attention", "ring"]) == 0
    out = capsys.readouterr().out
    first, second, third, *replay = out.splitlines()[:5]
    fourth = next(line for line in out.splitlines()[5:] if not line.startswith("the two models"))
    assert first.startswith("FITS: rank ") and "headroom" in first and "of 2 GiB" in first
    assert second.startswith("static: ") and "over 2 steps" in second and "tokens/s" in second
    assert "+-20% assumed for a derived cost model" in second
    assert third.startswith("time of step 0: compute ") and "exposed communication" in third
    assert replay[0].startswith("replay of step 0, operation by operation: ") and "times the predicted" in replay[0]
    assert replay[1].startswith("replay of step 0: compute ") and "exposed swap none" in replay[1]
    assert "replay: 2 layers replayed forward and backward" in out
    assert "guess: replay, device: attention on CPU process as measured on an H100" in out
    assert fourth.startswith("memory of rank ") and "activations" in fourth
    for words in ("tiny on laptop-cpu", "ring 2", "solver: static plan", "cost model: derived for tiny",
                  "what would help most", "guess: device CPU process", f"lengths {lengths}: your own file"):
        assert words in out


def test_a_narrow_terminal_has_fewer_columns_and_no_broken_words() -> None:
    columns = ("microbatch", "attention", "ranks", "start", "peak", "memory")
    rows = [("0", "ulysses 8", "0-7", "0 ms", "30 GiB", "swap 49%, recompute 50%")]
    assert fitting_columns(columns, rows, 200) == (0, 1, 2, 3, 4, 5)
    needed = 10 + 9 + 5 + 5 + 6 + 23 + 6 * 3 + 1
    assert fitting_columns(columns, rows, needed) == (0, 1, 2, 3, 4, 5)
    assert fitting_columns(columns, rows, needed - 1) == (0, 1, 2, 4, 5)  # start goes first
    assert fitting_columns(columns, rows, 10) == (0, 1, 2, 5)  # what the table is for stays


def test_the_sharding_that_fits_is_priced_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("100000\n" + "2000\n" * 60)
    flags = ["--lengths", str(path), "--model", "gpt-7b", "--cluster", "a100-40g-64", "--strategy", "static"]
    assert run(flags) == 0
    assert "priced with zero3: gather_once needs 49.1 GiB per device" in " ".join(capsys.readouterr().out.split())
    assert run(["--lengths", str(path), "--model", "tiny", "--cluster", "a100-40g-64", "--strategy", "static"]) == 0
    assert "zero3" not in capsys.readouterr().out


def test_a_measured_cost_is_used_and_its_band_shown(
    lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    derived = derive_cost(load_cluster("laptop-cpu"), load_model("tiny"), num_ranks=4)
    origin = replace(
        derived.provenance, source="measured", num_samples=12, measured_on="box", max_relative_error=0.07, notes=()
    )
    doubled = tuple(replace(fit, fixed_s=2 * fit.fixed_s + 1.0) for fit in derived.times)
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(to_plain(replace(derived, times=doubled, provenance=origin))))
    flags = ["--lengths", lengths, "--strategy", "static", "--degree", "4", "--steps", "1"]
    slow, fast = planned(capsys, *flags, "--cost", str(path)), planned(capsys, *flags)
    assert slow["steps"][0]["replay"] is None and fast["steps"][0]["replay"] is not None
    assert slow["steps"][0]["predicted_s"] > fast["steps"][0]["predicted_s"] + 1.0
    assert run([*flags, "--cost", str(path)]) == 0
    out = capsys.readouterr().out
    assert "+-7% worst error of 12 samples" in out and "measured together" in out
    assert "cost model: measured for tiny" in out and "replay of step" not in out
    assert run([*flags, "--cost", str(path), "--model", "llama-7b", "--cluster", "h200-8"]) == 0
    assert "was measured for model tiny, not for llama-7b" in capsys.readouterr().out


def test_stages_and_tensor_parallel_leave_fewer_data_ranks(
    lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lengths", lengths, "--strategy", "hdp-pp", "--steps", "1"]
    grid = ["--pipeline-parallel", "2", "--tensor-parallel", "2"]
    trace = tmp_path / "trace.json"
    alone, parts = planned(capsys, *flags), planned(capsys, *flags, *grid, "--trace", str(trace))
    assert parts["steps"][0]["replay"] is None and alone["steps"][0]["replay"] is not None
    assert parts["steps"][0]["predicted_s"] != alone["steps"][0]["predicted_s"]
    lanes = {event["tid"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert len(lanes) == 1  # 4 devices, 2 x 2 of them for the one data rank
    assert run([*flags, *grid]) == 0
    out = capsys.readouterr().out
    assert "note: 1 data ranks x 2 tensor-parallel devices x 2 pipeline stages" in out
    assert "2 pipeline stages priced alike: 2 layers and the head on each" in out
    path = tmp_path / "machine.yaml"
    derived = derive_cost(load_cluster("laptop-cpu"), load_model("tiny"), num_ranks=2, num_stages=2)
    path.write_text(yaml.safe_dump(to_plain(derived)))
    assert planned(capsys, *flags, "--cost", str(path), "--pipeline-parallel", "2")["steps"][0]["predicted_s"] > 0


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from launch.plan_command import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'yaml', 'pulp', 'highspy', 'tyro', 'megatron'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "--batch-tokens" in done.stdout
    assert "a100-40g-64" in done.stdout
    assert done.stderr.strip() == "[]"


def test_planning_never_loads_torch(lengths: str) -> None:
    program = (
        "import sys\nfrom launch.plan_command import run\n"
        f"run(['--lengths', {lengths!r}, '--strategy', 'static', '--json', '-'])\n"
        "assert not {'torch', 'megatron', 'tyro'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, timeout=60)
