"""Running ``longhaul plan`` in tests."""

from __future__ import annotations

import json

import pytest

from launch.plan_command import run

STEP_KEYS = {
    "step", "num_sequences", "num_tokens", "predicted_s", "bound_s", "gap", "solve_s", "status", "num_microbatches",
    "peak_bytes", "idle_fraction",
}
REPLAY_KEYS = {
    "step_s", "low_s", "high_s", "compute_s", "exposed_communication_s", "exposed_swap_s", "idle_s", "peak_bytes",
    "host_bytes", "max_nic_share", "model_flop", "mfu",
}
SUMMARY_KEYS = {"mean_step_s", "tokens_per_s", "tokens_per_s_per_device", "mean_gap", "max_gap", "mean_solve_s"}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)
