"""The command as a process: what it prints, what it returns, what it does not import."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from planner.errors import InfeasibleError
from trainer.rank_env import RankEnv

ROOT = Path(__file__).resolve().parents[2]
# Runs the command in a fresh interpreter and then names the heavy modules that it pulled in.
PROBE = """
import sys
from launch import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
print("\\nheavy:", sorted({"torch", "megatron", "numpy"} & set(sys.modules)) if sys.argv[1:2] != ["plan"]
      else sorted({"torch", "megatron"} & set(sys.modules)))
sys.exit(code)
"""


def longhaul(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["train", "--help"], ["--version"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_help_names_every_command_of_the_design() -> None:
    text = longhaul("--help").stdout
    verbs = "train plan calibrate doctor reproduce slurm report ckpt data init".split()
    assert [verb for verb in verbs if f"\n  {verb} " not in text] == []


@pytest.mark.parametrize("verb", ["slurm", "ckpt", "data", "init"])
def test_what_is_not_built_says_so(verb: str) -> None:
    result = longhaul(verb, "x")
    assert result.returncode == 2
    assert result.stderr.startswith(f"longhaul: error: longhaul {verb}: not built yet")
    assert result.stderr.count("\n") == 1


def test_an_unknown_command_gets_a_suggestion() -> None:
    result = longhaul("trian")
    assert result.returncode == 2
    assert result.stderr == "longhaul: error: unknown command 'trian' (did you mean 'train'?); see longhaul --help\n"


def test_no_command_is_an_error_with_the_help() -> None:
    result = longhaul()
    assert result.returncode == 2
    assert "usage: longhaul" in result.stderr


def test_a_bad_setting_is_refused_before_any_process_starts() -> None:
    result = longhaul("train", "--stpes", "3")
    assert result.returncode == 2
    assert "--stpes" in result.stderr
    assert "did you mean --steps?" in result.stderr.replace("'", "")
    assert "Traceback" not in result.stderr


def test_errors_become_their_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def infeasible(arguments: list[str]) -> int:
        raise InfeasibleError("needs 2 bytes\nhas 1", binding="device", needed_bytes=2, available_bytes=1)

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._VERBS, "plan", (infeasible, ""))
    assert cli.main(["plan"]) == 94
    assert capsys.readouterr().err == "longhaul: error: needs 2 bytes\nlonghaul: error: has 1\n"
    monkeypatch.setitem(cli._VERBS, "plan", (interrupted, ""))
    assert cli.main(["plan"]) == 130


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m launch.cli --help; echo code $? >&2"
    shell = subprocess.run(f"({command}) | true", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shell.stderr in ("code 141\n", "code 0\n")  # 0 where it wrote before the reader left
    writer = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert (writer.wait(timeout=60), errors) == (141, b"")


def test_under_torchrun_the_world_is_torchruns() -> None:
    env = RankEnv(rank=0, world_size=2, local_rank=0, local_world_size=2)
    assert cli._resolve([], env).run.world_size == 2
    assert cli._resolve(["--world-size", "2"], env).run.world_size == 2
    with pytest.raises(cli.SpecError, match="torchrun started 2 ranks"):
        cli._resolve(["--run.world_size=4"], env)
    assert cli._resolve([], None).run.world_size == 4
