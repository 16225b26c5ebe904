"""``longhaul plan --memory``: what it allows, what it says, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from launch.plan_command import run
from planner.codec import to_plain
from planner.cost.data_sheet import derive_cost
from planner.errors import InfeasibleError, SpecError
from planner.inputs.files import load_cluster, load_model

CLUSTER = ["--model", "gpt-7b", "--cluster", "a100-40g-64", "--batch-sequences", "138"]


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{size}\n" for size in [150_000, 110_000, 60_000, *range(1000, 60_000, 440)]))
    return str(path)


def step_s(capsys: pytest.CaptureFixture[str], *flags: str) -> float:
    assert run([*CLUSTER, *flags, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["summary"]["mean_step_s"]


def test_more_policies_make_a_step_shorter(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    adaptive = ("--lengths", lengths, "--strategy", "adaptive")
    seconds = {name: step_s(capsys, *adaptive, "--memory", name) for name in ("keep", "swap", "recompute", "auto")}
    assert seconds["keep"] == step_s(capsys, *adaptive)  # the default
    assert max(seconds["swap"], seconds["recompute"], seconds["auto"]) < 0.9 * seconds["keep"]


def test_the_policy_is_told(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*CLUSTER, "--lengths", lengths, "--strategy", "hdp", "--memory", "swap"]) == 0
    text = capsys.readouterr().out
    assert "memory policy: " in text and " to need fewer ranks (" in text and " instead of " in text
    assert re.search(r"swap \d+%", text.split("microbatch", 1)[1])  # in the table of groups
    assert run([*CLUSTER, "--lengths", lengths, "--strategy", "hdp"]) == 0
    assert "memory policy: all activations kept, as --memory keep says\n" in capsys.readouterr().out


def test_chunks_hold_what_nothing_else_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.txt"
    path.write_text("2000000\n20000\n20000\n")
    flags = ["--model", "llama-3-8b", "--cluster", "h200-8", "--lengths", str(path), "--batch-sequences", "3"]
    with pytest.raises(InfeasibleError, match=r"2000000 tokens\) fits in no group"):
        run([*flags, "--memory", "recompute"])
    trace, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert run([*flags, "--memory", "chunk", "--trace", str(trace), "--html", str(page)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    size = re.search(r"memory policy: 1 of 1 microbatches do not keep all, 1 run in chunks of ([\d,]+) tokens per "
                     r"rank: 1 since no number of ranks could keep all \(2M tokens on 8\)", text)
    assert size and f"chunks of {size.group(1)}" in text.split("microbatch", 1)[1]  # in the table of groups
    assert json.loads(trace.read_text())["traceEvents"] and page.read_text()


def test_unknown_policies_and_costs_without_prices_are_refused(lengths: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--memory: 'some' is none of keep, swap, recompute, chunk, auto"):
        run([*CLUSTER, "--lengths", lengths, "--memory", "some"])
    cost = to_plain(derive_cost(load_cluster("a100-40g-64"), load_model("gpt-7b"), num_ranks=64))
    cost["activation"] = None
    del cost["chunks"]
    path = tmp_path / "cost.yaml"
    path.write_text(yaml.safe_dump(cost))
    with pytest.raises(SpecError, match="--memory swap: .* has no prices for it"):
        run([*CLUSTER, "--lengths", lengths, "--memory", "swap", "--cost", str(path)])
