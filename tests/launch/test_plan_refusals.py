"""``longhaul plan``: every mistake is one line, with the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.plan_command import run
from planner.codec import to_plain
from planner.cost.data_sheet import derive_cost
from planner.errors import InfeasibleError, SpecError
from planner.inputs.files import load_cluster, load_model

ROOT = Path(__file__).parents[2]


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
    built_in = (ROOT / "planner" / "inputs" / "hardware" / "h100-8.yaml").read_text()
    path.write_text(built_in.replace("num_nodes: 1\n", "num_nodes: 10000000\n"))
    with pytest.raises(SpecError, match="has 80000000 devices; at most 1000000 are planned for"):
        run(["--lengths", lengths, "--cluster", str(path)])


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
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background inherit: ignore it
        "from launch import cli, plan_run\n"
        "planned = plan_run._candidates\n"
        "def interrupted(*arguments):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    return planned(*arguments)\n"
        "plan_run._candidates = interrupted\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command[3:]], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "longhaul: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "message"), [
    (["--pipeline-parallel", "3"], "--tensor-parallel 1 x --pipeline-parallel 3 must divide the 4 devices of laptop"),
    (["--pipeline-parallel", "x"], "--pipeline-parallel: expected a whole number of at least 1, got 'x'"),
    (["--pipeline-parallel", "2", "--memory", "chunk"], "--memory chunk: chunks are not priced with pipeline stages"),
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
