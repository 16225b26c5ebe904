"""``longhaul plan`` from flags to table and JSON: what it prints, what it refuses, what it does not import."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.plan_command import _parser, run
from launch.plan_job import read_job
from launch.plan_output import fitting_columns
from planner.analytic import derive_cost
from planner.codec import to_plain
from planner.errors import InfeasibleError, SpecError
from planner.specs import load_cluster, load_model
from planner.step_planner import STRATEGIES

ROOT = Path(__file__).parents[2]
STEP_KEYS = {
    "step", "num_sequences", "num_tokens", "predicted_s", "bound_s", "gap", "solve_s", "status", "num_microbatches",
    "peak_bytes", "idle_fraction",
}
REPLAY_KEYS = {
    "step_s", "low_s", "high_s", "compute_s", "exposed_communication_s", "exposed_swap_s", "idle_s", "peak_bytes",
    "host_bytes", "max_nic_share", "model_flop", "mfu",
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
                  "what would help most", "guess: device CPU process", f"lengths {lengths}: a file of yours"):
        assert words in out


def test_a_narrow_terminal_has_fewer_columns_and_no_broken_words() -> None:
    columns = ("microbatch", "attention", "ranks", "start", "peak", "memory")
    rows = [("0", "ulysses 8", "0-7", "0 ms", "30 GiB", "swap 49%, recompute 50%")]
    assert fitting_columns(columns, rows, 200) == (0, 1, 2, 3, 4, 5)
    needed = 10 + 9 + 5 + 5 + 6 + 23 + 6 * 3 + 1
    assert fitting_columns(columns, rows, needed) == (0, 1, 2, 3, 4, 5)
    assert fitting_columns(columns, rows, needed - 1) == (0, 1, 2, 4, 5)  # start goes first
    assert fitting_columns(columns, rows, 10) == (0, 1, 2, 5)  # what the table is for stays


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
    flags = ["--lengths", str(path), "--model", "gpt-7b", "--cluster", "a100-40g-64"]
    assert main(["plan", *flags, "--memory", "auto", "--json", "-"]) == 0, "the hint is a true one"
    with pytest.raises(InfeasibleError, match="or try --memory auto$") as refused:
        run(flags)
    assert refused.value.exit_code == 94 and refused.value.needed_bytes > refused.value.available_bytes > 0
    assert "GiB" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("flags", "words"), [
    (["--strategy", "all", "--degree", "2"], "--degree belongs to --strategy static"),
    (["--strategy", "flexps"], "did you mean 'flexsp'?"),
    (["--degree", "4"], "--degree"),
    (["--strategy", "static", "--degree", "0"], "--degree: expected a whole number of at least 1, got '0'"),
    (["--strategy", "static", "--degree", "9"], "9"),
    (["--attention", "spiral"], "none of auto, ulysses, ring, usp, double_ring, group_cast, all_gather"),
    (["--batch-sequences", "4", "--batch-tokens", "4K"], "not both"),
    (["--batch-sequences", "x"], "--batch-sequences: expected a whole number"),
    (["--batch-tokens", "many"], "--batch-tokens: expected a token count"),
    (["--batch-tokens", "0"], "--batch-tokens: expected at least 1 token"),
    (["--max-length", "1"], "every sequence is longer"),
    (["--steps", "-1"], "--steps"),
    (["--steps", "9" * 20], "--steps: expected a whole number"),
    (["--batch-sequences", "9" * 5000], "--batch-sequences: expected a whole number"),
    (["--batch-tokens", "9" * 400 + "M"], "is too large"),
    (["--max-length", "9" * 20], "is too large"),
    (["--device-budget", "1e999"], "is too large"),
    (["--tensor-parallel", "3"], "must divide the 4 devices"),
    (["--device-budget", "lots"], "--device-budget: expected a quantity"),
    (["--device-budget", "40 GiB"], "not within the 3 GiB of CPU process"),
    (["--cluster", "laptop"], "did you mean 'laptop-cpu'?"),
    (["--model", "tinny"], "did you mean 'tiny'?"),
    (["--trace", "no/such/folder/t.json"], "--trace: folder no/such/folder does not exist"),
    (["--html", "no/such/folder/t.html"], "--html: folder no/such/folder does not exist"),
    (["--trace", "."], "--trace: . is a folder; name a file"),
    (["--seed", "1"], "--seed belongs to named lengths"),
    (["--cost", "no.yaml"], "cost file no.yaml: cannot be read"),
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
    with pytest.raises(SpecError, match=r"--lengths FILE\|NAME is needed.*wikipedia"):
        run([])


@pytest.mark.parametrize(("name", "words"), [
    ("wikpedia", "'wikpedia' is neither a file nor known lengths (did you mean 'wikipedia'?)"),
    ("zzz", "known: byted, commoncrawl"), ("no/such.txt", "cannot be read"), (".", "cannot be read"),
])
def test_unknown_lengths(name: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        run(["--lengths", name])
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "words"), [
    (b"5\n-3\n", "line 2: '-3'"), (b"", "holds no lengths"), (b"0\n", "line 1: a sequence has at least 1 token"),
    (b"\xff\xfe1\n", "it is not a text file"), (b"\0\0\n", "line 1"), (b"1.5\n", "line 1: '1.5'"),
    (b"9" * 20, "line 1"),
])
def test_bad_lengths_files(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(text)
    with pytest.raises(SpecError) as refused:
        run(["--lengths", str(path)])
    assert words in str(refused.value) and refused.value.exit_code == 2


@pytest.mark.parametrize(("text", "words"), [
    (b"name: [x\n", "not valid YAML"), (b"", "expected a mapping"), (b"- 1\n", "expected a mapping"),
    (b"nam: x\n", "did you mean 'name'?"), (b"a: \xff\n", "it is not a text file"),
    (b"a: " + b"[" * 3000, "nested too deeply"), (b"!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    (None, "Is a directory"),
])
@pytest.mark.parametrize("flag", ["--model", "--cluster", "--cost"])
def test_a_malformed_file_is_one_line_and_exit_2(
    flag: str, text: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    if flag == "--cost" and text == b"nam: x\n":
        words = "unknown key 'nam'"
    assert main(["plan", "--lengths", "wikipedia", flag, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err


def test_a_cluster_that_nobody_has_is_refused(lengths: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    built_in = (ROOT / "planner" / "hardware" / "h100-8.yaml").read_text()
    path.write_text(built_in.replace("num_nodes: 1\n", "num_nodes: 10000000\n"))
    with pytest.raises(SpecError, match="has 80000000 devices; at most 1000000 are planned for"):
        run(["--lengths", lengths, "--cluster", str(path)])


def test_a_lengths_file_may_begin_with_a_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xef\xbb\xbf100\r\n200\r\n")
    assert planned(capsys, "--lengths", str(path), "--strategy", "static")["steps"][0]["num_tokens"] == 300


def test_output_that_nobody_takes_is_no_traceback(lengths: str) -> None:
    """A pipe whose reader has left, a full disk, an output that was closed."""
    command = f"{sys.executable} -m launch.cli plan --lengths {lengths} --strategy static"
    full = [f"{command} > /dev/full"] if Path("/dev/full").exists() else []
    for line, code in ((f"(sleep 2; exec {command}) | true; exit ${{PIPESTATUS[0]}}", 141), *((f, 2) for f in full),
                       (f"{command} >&-", 0)):
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == code, line
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == (code == 2), line


def test_an_interrupt_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    command = [sys.executable, "-m", "launch.cli", "plan", "--lengths", "github", "--max-length", "1M", "--model",
               "llama-3-8b", "--cluster", "h100-12288", "--batch-tokens", "64M", "--strategy", "all", "--json",
               str(target)]
    program = (
        "import os, signal, sys, threading\n"
        "from launch import cli, plan_command\n"
        "planned = plan_command._candidates\n"
        "def interrupted(*arguments):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    return planned(*arguments)\n"
        "plan_command._candidates = interrupted\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command[3:]], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "longhaul: interrupted\n")
    assert list(tmp_path.iterdir()) == []


NAMED = ("--lengths", "prolong", "--max-length", "4K", "--strategy", "static", "--degree", "4")


def test_named_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, *NAMED, "--steps", "2")
    assert [step["num_sequences"] for step in result["steps"]] == [512, 512]
    mean = sum(step["num_tokens"] for step in result["steps"]) / 1024
    assert mean == pytest.approx(3052 * 0.4812 / 0.8034, rel=0.1)  # documents up to 4K: their tokens over their number
    assert planned(capsys, *NAMED, "--steps", "1")["steps"][0]["num_tokens"] == result["steps"][0]["num_tokens"]
    other = planned(capsys, *NAMED, "--steps", "1", "--seed", "7")
    assert other["steps"][0]["num_tokens"] != result["steps"][0]["num_tokens"]
    assert run([*NAMED, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "lengths prolong: quantiles of 77,932 documents" in out and "sequences over 4096 tokens dropped" in out
    with pytest.raises(SpecError, match="the shortest of prolong has 575 tokens"):
        run(["--lengths", "prolong", "--max-length", "500"])


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 30_000), num_steps=st.integers(1, 4))
def test_enough_is_drawn_for_batches_of_tokens(num_tokens: int, num_steps: int) -> None:
    flags = ["--lengths", "wikipedia", "--batch-tokens", str(num_tokens), "--steps", str(num_steps)]
    batches = read_job(_parser().parse_args(flags)).batches
    longer = read_job(_parser().parse_args([*flags[:-1], str(num_steps + 1)])).batches
    assert len(batches) == num_steps and longer[:num_steps] == batches
    assert all(sum(batch) <= num_tokens or len(batch) == 1 for batch in batches)


def test_all_compares_every_strategy(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "2", "--strategy", "all")
    result = planned(capsys, *flags)
    assert result["strategy"] == "all" and [row["strategy"] for row in result["comparison"]] == list(STRATEGIES)
    known = [row for row in result["comparison"] if "refused" not in row]
    assert all(set(row["summary"]) == SUMMARY_KEYS and len(row["steps"]) == 2 for row in known)
    means = [row["summary"]["mean_step_s"] for row in known]
    assert result["summary"]["mean_step_s"] == min(means) and max(means) > min(means)
    assert all(set(step) == STEP_KEYS for row in known for step in row["steps"])
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert "ratio to best" in out and all(f"│ {row['strategy']} " in out for row in known)
    assert "replayed" in out and " * │" in out and "fastest: " in out


def test_all_replays_every_first_step(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "2", "--strategy", "all")
    known = [row for row in planned(capsys, *flags)["comparison"] if "refused" not in row]
    assert all(set(row["first_step_replay"]) == REPLAY_KEYS for row in known)
    times = [row["first_step_replay"]["step_s"] for row in known]
    assert [row["is_fastest_by_replay"] for row in known].index(True) == times.index(min(times))
    assert sum(row["is_fastest_by_replay"] for row in known) == 1
    monkeypatch.setattr("launch.plan_replay.MAX_COMPARING_S", 0.0)
    result = planned(capsys, *flags)
    fastest = min((row for row in result["comparison"] if "refused" not in row),
                  key=lambda row: row["summary"]["mean_step_s"])["strategy"]
    for row in result["comparison"]:
        assert row.get("first_step_replay") is None or row["strategy"] == fastest
        assert not row.get("is_fastest_by_replay")
    assert all(step["replay"] is not None for step in result["steps"])
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert f"note: of the strategies only {fastest} is replayed: the first step of the others would take about" in out
    assert "fastest: " not in out
    monkeypatch.setattr("launch.plan_replay.MAX_REPLAYING_S", 0.0)
    assert run(list(flags)) == 0
    assert "note: not replayed: it would take about" in capsys.readouterr().out


def test_a_strategy_that_cannot_is_a_line_not_the_end(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(lengths: object, **_: object) -> NoReturn:
        raise InfeasibleError("no room for it", binding="memory", needed_bytes=2, available_bytes=1)

    monkeypatch.setitem(STRATEGIES, "hdp", refuse)
    flags = ("--lengths", lengths, "--steps", "1", "--strategy", "all")
    result = planned(capsys, *flags)
    assert {"strategy": "hdp", "refused": "step 0: no room for it"} in result["comparison"] and result["steps"]
    assert run(list(flags)) == 0
    assert "hdp refuses step 0: no room for it" in capsys.readouterr().out
    for name in STRATEGIES:
        monkeypatch.setitem(STRATEGIES, name, refuse)
    with pytest.raises(InfeasibleError, match="DOES NOT FIT: tiny on laptop-cpu: no room for it"):
        run(list(flags))


def test_trace_and_page(lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    trace, page = tmp_path / "t.json", tmp_path / "p.html"
    assert run(["--lengths", lengths, "--strategy", "all", "--trace", str(trace), "--html", str(page)]) == 0
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}
    text = page.read_text()
    assert "FITS: rank" in text and "every strategy on the same batches" in text
    assert "FITS: rank" in capsys.readouterr().out


def test_the_trace_has_lanes_of_the_replay(lengths: str, tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    assert run(["--lengths", lengths, "--strategy", "static", "--degree", "4", "--attention", "ring", "--steps", "2",
                "--trace", str(target)]) == 0
    trace = json.loads(target.read_text())
    lanes = {event["cat"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert lanes == {"microbatch", "step", "replay compute", "replay exchange"}  # one node, nothing swapped
    assert "4 of 4 ranks" in trace["otherData"]["replay"]


def test_very_many_ranks_are_not_replayed(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner import replay

    monkeypatch.setattr(replay, "MAX_RANKS", 3)
    flags = ("--lengths", lengths, "--strategy", "static")
    assert planned(capsys, *flags)["steps"][0]["replay"] is None
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert "note: not replayed: 4 ranks, the replay takes at most 3" in out and "replay of step" not in out


def test_a_page_without_plotly_is_refused_before_planning(lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner import page_parts

    monkeypatch.setattr(page_parts, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="--html needs plotly"):
        run(["--lengths", lengths, "--html", "page.html"])
    assert not Path("page.html").exists()


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


@pytest.mark.parametrize(("flags", "message"), [
    (["--pipeline-parallel", "3"], "--tensor-parallel 1 x --pipeline-parallel 3 must divide the 4 devices of laptop"),
    (["--pipeline-parallel", "x"], "--pipeline-parallel: expected a whole number of at least 1, got 'x'"),
    (["--pipeline-parallel", "2", "--memory", "auto"], "--memory auto: with pipeline stages only keep is priced"),
    (["--pipeline-parallel", "8", "--cluster", "h200-8"], "8 pipeline stages are more than its 4 layers"),
    (["--tensor-parallel", "8", "--cluster", "h200-8"], "--tensor-parallel 8 does not divide the 4 query heads"),
])
def test_impossible_stages_are_refused(lengths: str, flags: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        run(["--lengths", lengths, *flags])


def test_a_cost_for_another_number_of_stages_is_refused(lengths: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    derived = derive_cost(load_cluster("laptop-cpu"), load_model("tiny"), num_ranks=4)
    path.write_text(yaml.safe_dump(to_plain(derived)))
    with pytest.raises(SpecError, match="priced for 1 pipeline stages, --pipeline-parallel is 2: set it to match"):
        run(["--lengths", lengths, "--cost", str(path), "--pipeline-parallel", "2"])


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
