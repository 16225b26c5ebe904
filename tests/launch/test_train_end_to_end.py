"""The real command with real ranks: stopped, killed, resumed, under torchrun, on other grids of ranks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from planner.plan import plan_from_json
from tests.launch.tiny_run import train_arguments, write_corpus, write_cost
from trainer.prices.plan_inputs import load_cost
from trainer.record.run_records import read_executed

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 16
# 40 tokens a device: documents above that need a group, and 64 is the longest.
SETTINGS = (
    "--steps", str(NUM_STEPS), "--checkpoint-every", "4", "--run.keep-checkpoints", "3",
    "--plan.device-budget", "40 B", "--plan.wait-budget-s", "60", "--plan.time-limit-s", "60",
)
METRICS_FIELDS = (
    "step, loss, grad_norm, lr, num_tokens, num_sequences, max_sequence_tokens, strategy, plan_status, predicted_s, "
    "measured_s, bound_s, gap, plan_s, plan_wait_s, idle_fraction, peak_bytes, predicted_peak_bytes, tokens_per_s, "
    "model_flops, mfu"
).split(", ")
LIMIT_S = 240
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "launch.cli")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")


@dataclass(frozen=True, slots=True)
class Finished:
    code: int
    out: str
    errors: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    @property
    def plans(self) -> list[Any]:
        return [plan_from_json(line) for line in (self.folder / "plans.jsonl").read_text().splitlines()]


class Run:
    """One launch of the command, in its own folder; what it prints goes to files, so that it never blocks."""

    def __init__(self, work: Path, folder: Path, *more: str, launcher: tuple[str, ...] = ("-m", "launch.cli")) -> None:
        self.folder = folder
        self._out, self._errors = work / f"{folder.name}.out", work / f"{folder.name}.err"
        arguments = train_arguments(work, folder, *SETTINGS, *more)
        with self._out.open("w") as out, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *arguments], cwd=ROOT, stdout=out, stderr=errors,
                env={**os.environ, "LONGHAUL_CACHE": str(work / "cache")},
            )

    def finish(self) -> Finished:
        try:
            code = self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
        return Finished(code, self._out.read_text(), self._errors.read_text(), self.folder)

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl holds this step."""
        self.wait_until(lambda: f'{{"step": {step},' in _text_of(self.folder / "metrics.jsonl"), f"step {step}")

    def wait_until(self, test: Callable[[], bool], what: str) -> None:
        stop_s = time.monotonic() + LIMIT_S
        while not test():
            assert self.process.poll() is None, f"ended before {what}: {self._errors.read_text()}"
            assert time.monotonic() < stop_s, f"never came to {what}"
            time.sleep(0.01)

    def errors_hold(self, text: str) -> bool:
        return text in self._errors.read_text()


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below ``pid``, by process id."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended while we looked
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: commands[child] for child in found - {pid} if child in commands}


def rank_process(launcher_pid: int, rank: int) -> int:
    for pid, command in descendants(launcher_pid).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if "launch.worker" in command and f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"no process of rank {rank}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_all_end(processes: dict[int, str]) -> None:
    stop_s = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < stop_s:
        time.sleep(0.05)
    assert [command for pid, command in processes.items() if is_alive(pid)] == []


def assert_equal_runs(run: Finished, reference: Finished) -> None:
    """Bit for bit, and every step recorded once, in order."""
    assert run.summary == reference.summary
    assert [record["step"] for record in run.records] == list(range(NUM_STEPS))
    assert run.losses == reference.losses
    assert [plan.step for plan in run.plans] == list(range(NUM_STEPS))
    assert [plan.microbatches for plan in run.plans] == [plan.microbatches for plan in reference.plans]
    executed = read_executed(run.folder)  # every step of so short a run is timed, and fits its plan
    assert [measured.step for _, measured in executed] == list(range(NUM_STEPS))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end")
    write_corpus(folder / "corpus")
    write_cost(folder / "cost.json")
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> Finished:
    """Four ranks, never interrupted."""
    return Run(work, work / "reference").finish()


def test_an_uninterrupted_run_leaves_all_its_records(reference: Finished) -> None:
    assert (reference.code, reference.errors) == (0, "")
    assert_equal_runs(reference, reference)
    assert [set(METRICS_FIELDS) - record.keys() for record in reference.records] == [set()] * NUM_STEPS
    assert [record["num_tokens"] for record in reference.records] == [plan.num_tokens for plan in reference.plans]
    assert {group.degree for plan in reference.plans for m in plan.microbatches for group in m.groups} >= {1, 2}
    assert reference.losses[-1] < reference.losses[0] - 0.5
    assert reference.summary["next_step"] == NUM_STEPS
    assert reference.summary["loss"] == reference.losses[-1]
    assert sorted(path.name for path in (reference.folder / "checkpoints").iterdir()) == [
        "step-00000008", "step-00000012", "step-00000016"
    ]
    assert "9 documents longer than that were split" in reference.out
    assert reference.out.count("\nstep ") == NUM_STEPS


def test_a_made_up_cost_model_is_found_out_and_refitted(work: Path, reference: Finished) -> None:
    assert reference.out.count("\ndrift: the cost model is off: microbatches take ") == 1
    assert [record["drift_ratio"] is None for record in reference.records] == [step < 6 for step in range(NUM_STEPS)]
    load_cost(str(reference.folder / "cost-refit.json"))
    again = work / "refit-again.json"
    report = subprocess.run(
        [sys.executable, "-m", "launch.cli", "report", str(reference.folder), "--json", "-", "--refit", str(again)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )
    assert again.read_text() == (reference.folder / "cost-refit.json").read_text()
    value = json.loads(report.stdout)
    assert (value["num_steps"], value["num_recorded"], value["drift"]["is_off"]) == (NUM_STEPS, NUM_STEPS, True)
    assert value["refit"]["error_after"] < value["refit"]["error_before"]


def test_stopped_then_killed_then_resumed_equals_uninterrupted(work: Path, reference: Finished) -> None:
    """Stopped under our own launcher, killed under it, and finished under torchrun."""
    folder = work / "interrupted"

    run = Run(work, folder)
    run.wait_for_step(1)
    started = descendants(run.process.pid)
    assert sum("planner.service" in command for command in started.values()) == 1
    stopped_rank = rank_process(run.process.pid, 2)
    os.kill(stopped_rank, signal.SIGSTOP)  # hold the run where it is, so that the stop comes between its steps
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: run.errors_hold("stopping after this step"), "the stop signal")
    os.kill(stopped_rank, signal.SIGCONT)
    stopped = run.finish()
    assert stopped.code == 75
    assert stopped.errors.splitlines()[1:] == [
        "longhaul: SIGINT: stopping after this step and saving (Ctrl-C again: stop now)",
        f"longhaul: stopped and saved; go on with: longhaul train {folder / 'config.yaml'} --resume",
    ]
    next_step = len(stopped.records)
    assert 2 <= next_step < NUM_STEPS
    assert stopped.summary["next_step"] == next_step
    assert (folder / "checkpoints" / f"step-{next_step:08d}").is_dir()
    assert f"\nstopped: {next_step} of {NUM_STEPS} steps" in stopped.out
    assert_all_end(started)

    run = Run(work, folder, "--resume")
    run.wait_for_step(max(next_step, 6))
    started = descendants(run.process.pid)
    assert sum("planner.service" in command for command in started.values()) == 1
    os.kill(rank_process(run.process.pid, 2), signal.SIGKILL)
    killed = run.finish()
    assert killed.code == 1
    assert killed.errors.startswith("longhaul: error: rank 2: killed by SIGKILL (out of memory, or kill -9)")
    assert killed.errors.count("\n") == 1
    assert len(killed.records) < NUM_STEPS
    assert f"resume: step {next_step} from " in killed.out
    assert_all_end(started)

    resumed = Run(work, folder, "--resume", launcher=TORCHRUN).finish()
    assert resumed.code == 0, resumed.errors
    assert_equal_runs(resumed, reference)
    assert "resume: step " in resumed.out
    shown = re.findall(rf"^step +(\d+)/{NUM_STEPS}", resumed.out, re.MULTILINE)
    assert shown[-1] == str(NUM_STEPS) and len(shown) == len(set(shown)), "rank 0 speaks, the others do not"


@pytest.mark.nightly
def test_torchrun_trains_the_same_from_the_start(work: Path, reference: Finished) -> None:
    run = Run(work, work / "torchrun", launcher=TORCHRUN).finish()
    assert run.code == 0
    assert_equal_runs(run, reference)
    assert run.out.count("\nstep ") == NUM_STEPS  # rank 0 speaks, the others do not


def test_one_rank_trains_the_same_to_rounding(work: Path, reference: Finished) -> None:
    run = Run(work, work / "one-rank", "--world-size", "1", "--plan.device-budget", "1 GiB").finish()
    assert (run.code, run.errors) == (0, "")
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)


def test_tensor_parallel_in_bf16_learns(work: Path, reference: Finished) -> None:
    run = Run(work, work / "tensor", "--tensor-parallel", "2", "--dtype", "bf16").finish()
    assert (run.code, run.errors) == (0, "")
    assert "ranks: 2 data x 2 tensor on cpu, bf16" in run.out
    assert all(map(math.isfinite, run.losses))
    assert run.losses == pytest.approx(reference.losses, rel=0.02)


def test_a_checkpoint_goes_on_with_fewer_ranks(work: Path, reference: Finished) -> None:
    folder = work / "fewer-ranks"
    shutil.copytree(reference.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000016")
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    run = Run(work, folder, "--world-size", "2", "--resume").finish()
    assert (run.code, run.errors) == (0, "")
    assert "resume: step 8 from " in run.out
    assert "ranks: 2 data x 1 tensor" in run.out
    assert [plan.sequences for plan in run.plans] == [plan.sequences for plan in reference.plans]
    assert {plan.num_ranks for plan in run.plans[8:]} == {2}
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
