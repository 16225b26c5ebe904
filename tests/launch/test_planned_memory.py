"""``longhaul train`` where memory is scarce: the plan chooses policies, the run says so, and repeats when resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli
from memory.activations import ActivationMemory
from planner.codec import to_plain
from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.cost.machine_profile import load_cost
from planner.errors import InfeasibleError
from planner.step_planner import greedy_step
from tests.launch.tiny_run import train_arguments, write_corpus, write_cost
from tests.plans import step_problem
from trainer.checkpoint.manifests import list_checkpoints
from trainer.prices.plan_inputs import with_policies
from trainer.prices.planned_memory import plan_memory
from trainer.settings.resolve import resolve_config

ROOT = Path(__file__).resolve().parents[2]
SCARCE = ("--model.num-layers", "4", "--plan.device-budget", "24 B", "--world-size", "2", "--plan.wait-budget-s", "60")
"""One byte a token: the longest sequence, 64 tokens on two ranks, takes 32 if all is kept."""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    kept = load_cost(str(write_cost(tmp_path / "kept.json")))
    fit = ActivationFit(
        swap_bytes_per_token=0.5, recompute_bytes_per_token=0.45, recompute_s_per_token=1e-6, copy_bytes_per_s=1e4,
        hidden_share=0.3,
    )
    (tmp_path / "cost.json").write_text(json.dumps(to_plain(replace(kept, activation=fit))))
    return tmp_path


def train(work: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = train_arguments(work, work / name, *SCARCE, *flags)
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def records(work: Path, name: str, file: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (work / name / file).read_text().splitlines()]


def test_a_run_in_little_memory_chooses_says_so_and_repeats_its_plans(work: Path) -> None:
    done = train(work, "run", "--steps", "4", "--checkpoint-every", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    assert told.count("memory: chosen by the plan") == 1
    assert "24 B hold 24 kept tokens; the longest sequence (64) on 2 of 2 ranks: swap" in told
    plans, metrics = records(work, "run", "plans.jsonl"), records(work, "run", "metrics.jsonl")
    swapped = [any(each["memory"]["swap_fraction"] > 0 for each in plan["microbatches"]) for plan in plans]
    assert any(swapped)
    assert all(record["predicted_peak_bytes"] <= 24 for record in metrics)
    assert [record["host_peak_bytes"] > 0 for record in metrics] == swapped
    assert any(record["predicted_host_bytes"] > 0 for record in metrics)  # made-up bytes, whole ones
    again = work / "again"
    shutil.copytree(work / "run", again)
    shutil.rmtree(list_checkpoints(again / "checkpoints")[-1])
    resumed = train(work, "again", "--steps", "4", "--checkpoint-every", "2", "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    runs = [[{**plan, "solver": None} for plan in each] for each in (plans, records(work, "again", "plans.jsonl"))]
    assert runs[0] == runs[1]
    assert [each["loss"] for each in records(work, "again", "metrics.jsonl")] == [each["loss"] for each in metrics]


@pytest.fixture
def lean(work: Path) -> Path:
    """Prices under which only chunks make room: little can be swapped or recomputed, a fifth of a token is K/V."""
    cost = load_cost(str(work / "cost.json"))
    assert cost.activation is not None
    little = replace(cost.activation, swap_bytes_per_token=0.1, recompute_bytes_per_token=0.1)
    chunks = ChunkFit(
        resident_bytes_per_token=0.2, num_kv_heads=2, fixed_bytes=0, bytes_per_token=1.0, shared_bytes_per_token=0.0,
        again_attention=0.3, again_linear=0.3, s_per_chunk=1e-5,
    )
    (work / "cost.json").write_text(json.dumps(to_plain(replace(cost, activation=little, chunks=chunks))))
    return work


def test_a_run_that_only_chunks_fit_trains_as_if_all_were_kept(lean: Path) -> None:
    scarce = ("--steps", "3", "--plan.device-budget", "20 B", "--attention", "ring")
    done = train(lean, "run", *scarce)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the longest sequence (64) on 2 of 2 ranks: chunks of 10, 16 B per device instead of 32 B" in " ".join(
        done.stdout.split()
    )
    plans, metrics = records(lean, "run", "plans.jsonl"), records(lean, "run", "metrics.jsonl")
    assert any(each["memory"].get("chunk_tokens") for plan in plans for each in plan["microbatches"])
    assert all(record["predicted_peak_bytes"] <= 20 and record["gradients"] == "exact" for record in metrics)
    alone = ("--world-size", "1", "--plan.device-budget", "64 B")
    kept = train(lean, "kept", "--steps", "3", "--memory", "keep", *alone)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    losses = [[record["loss"] for record in found] for found in (metrics, records(lean, "kept", "metrics.jsonl"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_too_little_for_any_policy_is_one_line_and_94(work: Path) -> None:
    done = train(work, "run", "--steps", "2", "--plan.device-budget", "8 B")
    assert done.returncode == 94
    (line,) = done.stderr.splitlines()
    assert "(64 tokens) fits in no group" in line and "needs" in line and "the budget is 8 B" in line


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (("--strategy", "flexsp"), ", or use --strategy adaptive (flexsp chooses no memory policies (adaptive: "),
        (("--memory", "keep"), ", or use --memory auto"),
        (("--memory", "keep", "--strategy", "zeppelin"), ", or use --strategy adaptive --memory auto (zeppelin"),
    ],
)
def test_a_run_that_could_fit_is_told_how(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], advice: str
) -> None:
    """Before a rank is started. What is advised starts, as the first test of this file shows."""
    monkeypatch.setenv("LONGHAUL_CACHE", str(work / "cache"))
    assert cli.main(train_arguments(work, work / "run", *SCARCE, "--steps", "2", *flags)) == 94
    (line,) = capsys.readouterr().err.splitlines()
    assert "(64 tokens) fits in no group" in line and advice in line


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (("--strategy", "flexsp"), "memory: all activations kept: flexsp chooses no memory policies (adaptive: swap"),
        (("--memory", "keep"), "memory: all activations kept: as --memory keep says"),
        (("--memory", "recompute"), "memory: of the run"),
    ],
)
def test_a_run_whose_plans_choose_nothing_says_why(flags: tuple[str, ...], note: str) -> None:
    runtime = SimpleNamespace(memory=ActivationMemory(note="memory: of the run" if "recompute" in flags else ""))
    memory, _, _ = plan_memory(resolve_config([*flags]), runtime, None, None, Path(), 1)
    assert memory.note.startswith(note)


def test_a_late_step_gets_a_plan_whose_policies_make_it_fit(work: Path) -> None:
    """The greedy plan stands in for a planner that is late; it must not end the run where only policies make room."""
    cost = load_cost(str(work / "cost.json"))
    kept = PlanLimits(device_budget_bytes=24, max_ulysses_degree=4)
    with pytest.raises(InfeasibleError):
        greedy_step(step_problem([64, 5, 9], 2, cost, kept), step=0)
    limits = with_policies(kept, host_budget_bytes=10**6)
    plan = greedy_step(step_problem([64, 5, 9], 2, cost, limits), step=0)  # verified inside
    assert any(not each.memory.is_keep for each in plan.microbatches) and plan.peak_bytes <= 24
    assert (
        greedy_step(step_problem([40, 5], 2, cost, limits), step=0).microbatches
        == greedy_step(step_problem([40, 5], 2, cost, kept), step=0).microbatches
    )
