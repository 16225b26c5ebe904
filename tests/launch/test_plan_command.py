"""``longhaul plan`` from flags to table and JSON: what it prints, what it refuses, what it does not import."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan_command import run
from planner.errors import InfeasibleError, SpecError

ROOT = Path(__file__).parents[2]
STEP_KEYS = {
    "step", "num_sequences", "num_tokens", "predicted_s", "bound_s", "gap", "solve_s", "status", "num_microbatches",
    "peak_bytes", "idle_fraction",
}
SUMMARY_KEYS = {"mean_step_s", "tokens_per_s", "tokens_per_s_per_device", "mean_gap", "max_gap", "mean_solve_s"}


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    rng = random.Random(0)
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{int(rng.paretovariate(1.1) * 60) % 4000 + 1}\n" for _ in range(40)))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_exactly_the_promised_keys(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--lengths", lengths, "--batch-sequences", "16", "--strategy", "static")
    assert set(result) == {"schema", "model", "cluster", "strategy", "steps", "summary"}
    assert (result["schema"], result["model"], result["cluster"]) == (1, "tiny", "laptop-cpu")
    assert result["strategy"] == "static" and set(result["summary"]) == SUMMARY_KEYS
    assert [step["num_sequences"] for step in result["steps"]] == [16, 16, 8]
    sizes = [int(line) for line in Path(lengths).read_text().split()]
    assert [step["num_tokens"] for step in result["steps"]] == [sum(sizes[:16]), sum(sizes[16:32]), sum(sizes[32:])]
    for index, step in enumerate(result["steps"]):
        assert set(step) == STEP_KEYS and step["step"] == index
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


def test_flexsp_is_the_default_and_beats_the_worst_static_degree(
    lengths: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "1", "--attention", "ulysses")
    flexsp = planned(capsys, *common)
    assert flexsp["strategy"] == "flexsp"
    static = [planned(capsys, *common, "--strategy", "static", "--degree", degree) for degree in ("1", "2", "4")]
    assert flexsp["steps"][0]["predicted_s"] < max(result["steps"][0]["predicted_s"] for result in static)


def test_table_for_people(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lengths", lengths, "--batch-tokens", "4K", "--steps", "2", "--strategy", "static", "--degree", "2",
                "--attention", "ring"]) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("static: ") and "over 2 steps" in first and "tokens/s" in first
    for words in ("tiny on laptop-cpu", "ring 2", "solver: static plan", "cost model: derived for tiny"):
        assert words in out
    assert "guess: device" in out


def test_max_length_drops_and_says_so(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [int(line) for line in Path(lengths).read_text().split()]
    kept = [size for size in sizes if size <= 200]
    assert 0 < len(kept) < len(sizes)
    run(["--lengths", lengths, "--max-length", "200", "--strategy", "static"])
    assert f"{len(sizes) - len(kept)} of {len(sizes)} sequences over 200 tokens dropped" in capsys.readouterr().out
    result = planned(capsys, "--lengths", lengths, "--max-length", "200", "--strategy", "static")
    assert result["steps"][0]["num_tokens"] == sum(kept)


def test_json_file_beside_the_table(lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    assert run(["--lengths", lengths, "--strategy", "static", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["schema"] == 1 and "solver: " in capsys.readouterr().out


def test_the_sharding_that_fits_is_priced_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("100000\n" + "2000\n" * 60)
    flags = ["--lengths", str(path), "--model", "gpt-7b", "--cluster", "a100-40g-64", "--strategy", "static"]
    assert run(flags) == 0
    assert "priced with zero3: gather_once needs 49.1 GiB a device" in " ".join(capsys.readouterr().out.split())
    assert run(["--lengths", str(path), "--model", "tiny", "--cluster", "a100-40g-64", "--strategy", "static"]) == 0
    assert "zero3" not in capsys.readouterr().out


def test_a_sequence_that_fits_nowhere_is_infeasible(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("2000000\n")
    with pytest.raises(InfeasibleError) as refused:
        run(["--lengths", str(path), "--model", "gpt-7b", "--cluster", "a100-40g-64"])
    assert refused.value.exit_code == 94 and refused.value.needed_bytes > refused.value.available_bytes > 0
    assert "GiB" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("flags", "words"), [
    (["--strategy", "zeppelin"], "not built yet"),
    (["--strategy", "flexps"], "did you mean 'flexsp'?"),
    (["--degree", "4"], "--degree"),
    (["--strategy", "static", "--degree", "0"], "--degree: expected a whole number of at least 1, got '0'"),
    (["--strategy", "static", "--degree", "9"], "9"),
    (["--attention", "usp"], "none of auto, ulysses, ring"),
    (["--batch-sequences", "4", "--batch-tokens", "4K"], "not both"),
    (["--batch-sequences", "x"], "--batch-sequences: expected a whole number"),
    (["--batch-tokens", "many"], "--batch-tokens: expected a token count"),
    (["--batch-tokens", "0"], "--batch-tokens: expected at least 1 token"),
    (["--max-length", "1"], "every sequence is longer"),
    (["--steps", "-1"], "--steps"),
    (["--device-budget", "lots"], "--device-budget: expected a quantity"),
    (["--device-budget", "40 GiB"], "not within the 3 GiB of CPU process"),
    (["--cluster", "laptop"], "did you mean 'laptop-cpu'?"),
    (["--model", "tinny"], "did you mean 'tiny'?"),
    (["--trace", "t.json"], "--trace comes with the planner issue"),
    (["--html", "t.html"], "--html comes with the planner issue"),
    (["--json", "no/such/folder/x.json"], "folder no/such/folder does not exist"),
    (["--lenghts", "x"], "unknown argument '--lenghts' (did you mean '--lengths'?)"),
    (["--batch", "4"], "unknown argument '--batch'"),
    (["--model"], "expected one argument"),
    (["stray"], "unknown argument 'stray'"),
])
def test_mistakes_are_one_line(lengths: str, flags: list[str], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        run(["--lengths", lengths, *flags])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_lengths_are_needed() -> None:
    with pytest.raises(SpecError, match="--lengths FILE is needed"):
        run([])


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    program = (
        "import sys, time\nstarted = time.perf_counter()\n"
        "from launch.plan_command import run\n"
        "assert run(['--help']) == 0\n"
        "seconds = time.perf_counter() - started\n"
        "heavy = {'torch', 'numpy', 'rich', 'yaml', 'pulp', 'highspy', 'tyro', 'megatron'} & set(sys.modules)\n"
        "print(seconds, sorted(heavy), file=sys.stderr)\n"
    )
    best = 9.0
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        assert "--batch-tokens" in done.stdout and "a100-40g-64" in done.stdout
        seconds, heavy = done.stderr.split(maxsplit=1)
        assert heavy.strip() == "[]"
        best = min(best, float(seconds))
    assert best < 0.2


def test_planning_never_loads_torch(lengths: str) -> None:
    program = (
        "import sys\nfrom launch.plan_command import run\n"
        f"run(['--lengths', {lengths!r}, '--strategy', 'static', '--json', '-'])\n"
        "assert not {'torch', 'megatron', 'tyro'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, timeout=60)
