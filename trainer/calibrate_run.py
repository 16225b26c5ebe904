"""``longhaul calibrate`` on one rank: build the model of a training run, measure, write ``machine.yaml``."""

from __future__ import annotations

import platform
from pathlib import Path

import yaml

from parallel import comm
from planner.codec import to_plain
from planner.cost.machine_profile import MACHINE_FILE, MachineProfile
from planner.errors import EXIT_OK
from planner.units import format_count, format_seconds
from trainer.build import build_runtime
from trainer.data.tokenizer import load_tokenizer
from trainer.prices.calibration import Calibration, calibrate
from trainer.prices.cost_source import make_limits, measured_shapes
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig, model_spec

_WORK_UNITS = {"linear": "FLOP", "attention": "FLOP", "all_to_all": "bytes", "p2p": "bytes"}


def calibrate_rank(config: TrainConfig, env: RankEnv) -> int:
    """Measure as one of the run's ranks. Rank 0 writes ``RUN_DIR/machine.yaml`` and prints a summary. Collective."""
    spec = model_spec(config, vocab_size=load_tokenizer(config.data.tokenizer).vocab_size)
    runtime = build_runtime(config, env, spec)
    try:
        limits = make_limits(config, runtime, env.local_world_size)
        shapes = measured_shapes(config, runtime.mesh.data_size, limits)
        measured = calibrate(
            runtime, shapes, max_length=config.data.max_length, machine=platform.node(),
            node_size=limits.node_size(runtime.mesh.data_size),
        )
        if runtime.mesh.rank == 0:
            profile = MachineProfile(
                name=platform.node(), device=runtime.mesh.device.type, num_ranks=runtime.mesh.world_size,
                samples=measured.operations, cost=measured.cost,
            )
            text = yaml.safe_dump(to_plain(profile), sort_keys=False)
            (Path(config.run.dir) / MACHINE_FILE).write_text(text, encoding="utf-8")
            print("\n".join(summary_lines(measured)), flush=True)
    finally:
        comm.shutdown()
    return EXIT_OK


def summary_lines(measured: Calibration) -> list[str]:
    """Lines for the log: measured operations by size, then how well the cost model fits whole microbatches."""
    lines = [
        f"{sample.op:<11} size {sample.size:>9,}: {format_seconds(sample.seconds):>8}, "
        f"{format_count(sample.work / sample.seconds)} {_WORK_UNITS[sample.op]}/s per rank"
        for sample in measured.operations
    ]
    origin = measured.cost.provenance
    return [
        *lines,
        f"step without sequences (gather, reduce, optimizer): {format_seconds(measured.cost.step_fixed_s)}",
        f"fit of {origin.num_samples} microbatches of {origin.model}: mean error {origin.mean_relative_error:.1%}, "
        f"worst {origin.max_relative_error:.1%}",
    ]
