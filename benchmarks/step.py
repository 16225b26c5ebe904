"""Tokens per second of planned strategies against the best static layout, measured in one run on CPU ranks.

    python -m benchmarks.step [--steps 12] [--out benchmarks/results/step.md]
    python -m benchmarks.step --box 2x4 --strategies adaptive,flexsp,hdp,zeppelin --attention auto \\
        --peers deepspeed,verl,ring-flash-attn --model benchmarks/models/tiny-8-heads.yaml \\
        --max-length 2048 --tokens-per-step 8192 --steps 6

The second needs root and about ten minutes on two quiet cores.

Memory is part of the comparison, as in the FlexSP paper: with the default ``--capacity-tokens`` the longest sequence
needs all ranks, so a static degree runs every sequence on the group that only the longest ones need.

``--box`` runs in a cluster in a box (``benchmarks.box``, root on Linux): nodes with shaped network cards, ranks of a
fixed speed. The machine must be quiet, because core time that other programs take makes steps longer than predicted.
The default card gives each of four ranks 6 MB/s. With a rank's roughly 5 GFLOP/s and a model 128 wide, the ratio of
message time to matrix-product time is then about that of a 7B model on the FlexSP paper's cluster (5 to 10 GB/s between
nodes for each A100).

``--peers deepspeed,verl,ring-flash-attn`` adds public systems to the same run; ``benchmarks.peers.systems`` says what
is theirs, what is shared, and how to install them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence as SequenceOf
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.box import Box, BoxError, BoxSpec, box_problem
from benchmarks.peers.report import goal_lines
from benchmarks.peers.systems import PEERS
from benchmarks.step_report import conditions_here, markdown
from benchmarks.step_results import FLEXSP, StepRun, StepSettings
from launch import environment
from launch.worker import die_with_parent, leave
from planner.codec import from_plain, suggest, to_plain
from planner.errors import EXIT_OK, LonghaulError, SpecError
from planner.inputs.files import load_model, model_names
from planner.step_planner import check_strategy

_EXIT_FAILURE = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM
_BOX_TIMEOUT_S = 3600


def main(arguments: SequenceOf[str] | None = None) -> int:
    """Run the benchmark, print the report and write it where asked. Returns the exit code."""
    options = _parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        settings = _settings(options)
        for path in (options.out, options.json):
            if path is not None and not path.absolute().parent.is_dir():
                raise SpecError(f"{path}: folder {path.parent} does not exist")
    except SpecError as error:
        print(f"benchmarks.step: error: {error}", file=sys.stderr)
        return error.exit_code
    num_cores = environment.num_cores()
    environment.apply(environment.rank_process_settings(
        local_world_size=settings.num_ranks, is_single_node=True, num_cores=num_cores
    ))
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
        run_all = _run_ranks if settings.box is None else _run_in_box
        code = run_all(settings, Path(folder))
        if code != EXIT_OK:
            return code
        result = from_plain(StepRun, json.loads((Path(folder) / "result.json").read_text()), where="result")
    command = " ".join(("python -m benchmarks.step", *words))
    conditions = conditions_here(command, num_cores=num_cores, peers=settings.peers)
    report = markdown(result, conditions)
    if options.out is not None:
        options.out.write_text(report, encoding="utf-8")
    if options.json is not None:
        facts = {"setting": to_plain(conditions), "run": to_plain(result)}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(report)
    print("\n".join(goal_lines(result)))
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start (%(default)s)")
    parser.add_argument("--strategies", default=FLEXSP, help="with commas between them (%(default)s)")
    parser.add_argument("--peers", default="", help="with commas: deepspeed, verl, ring-flash-attn (none)")
    parser.add_argument("--box", metavar="NODESxRANKS", help="run in a box, such as 2x4, instead of --ranks")
    parser.add_argument("--nics", type=int, default=1, help="in a box: cards per node (%(default)s)")
    parser.add_argument("--nic-mbit", type=float, default=200, help="in a box: each card's Mbit/s (%(default)s)")
    parser.add_argument("--cpu-share", type=float, default=0.2, help="in a box: of one core, per rank (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="batches; each strategy runs each once (%(default)s)")
    parser.add_argument("--max-length", type=int, default=4096, help="longest sequence, tokens (%(default)s)")
    parser.add_argument("--tokens-per-step", type=int, default=16384, help="most tokens in a batch (%(default)s)")
    parser.add_argument(
        "--capacity-tokens", type=int,
        help="tokens of a microbatch that one rank may hold: the device budget (max length / ranks, rounded up)",
    )
    parser.add_argument(
        "--attention", choices=("ulysses", "ring", "auto"), default="ulysses",
        help="how groups of two and more share attention; auto: both (%(default)s)",
    )
    parser.add_argument("--model", default="tiny", help=f"{', '.join(model_names())} or a YAML file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, tokens and weights (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the report to this file (Markdown)")
    parser.add_argument("--json", type=Path, help="write every measured step to this file")
    return parser


def _settings(options: argparse.Namespace) -> StepSettings:
    """The benchmark's settings. Raises SpecError on options that do not fit together."""
    for name, lowest in (("ranks", 2), ("steps", 1), ("max_length", 32), ("seed", 0)):
        if getattr(options, name) < lowest:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {lowest}")
    if options.tokens_per_step < options.max_length:
        raise SpecError(
            f"--tokens-per-step {options.tokens_per_step}: less than one sequence of --max-length {options.max_length}"
        )
    load_model(options.model)
    strategies = tuple(options.strategies.split(","))
    for strategy in strategies:
        check_strategy(strategy, None)
    peers = _peers(options.peers)
    box = _box(options) if options.box else None
    num_ranks = options.ranks if box is None else box.num_ranks
    needed = -(-options.max_length // num_ranks)
    capacity = needed if options.capacity_tokens is None else options.capacity_tokens
    if capacity < needed:
        raise SpecError(
            f"--capacity-tokens {capacity}: {num_ranks} ranks cannot hold a sequence of {options.max_length} "
            f"tokens; at least {needed}"
        )
    return StepSettings(
        num_ranks=num_ranks, num_batches=options.steps, tokens_per_batch=options.tokens_per_step,
        max_length=options.max_length, capacity_tokens=capacity, attention=options.attention, model=options.model,
        seed=options.seed, strategies=strategies, peers=peers, box=box,
    )


def _peers(words: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(words.split(","))) if words else ()
    for name in names:
        if name not in PEERS:
            raise SpecError(f"--peers {name}: unknown peer{suggest(name, PEERS)}")
        problem = PEERS[name].problem()
        if problem is not None:
            raise SpecError(f"--peers {name}: {problem}")
    return names


def _box(options: argparse.Namespace) -> BoxSpec:
    problem = box_problem()
    if problem is not None:
        raise SpecError(f"--box {options.box}: no cluster in a box here: {problem}")
    try:
        num_nodes, ranks_per_node = map(int, options.box.split("x"))
        return BoxSpec(
            num_nodes=num_nodes, ranks_per_node=ranks_per_node, nics_per_node=options.nics,
            nic_bytes_per_s=options.nic_mbit * 1e6 / 8, cpu_share=options.cpu_share,
        )
    except ValueError as error:
        raise SpecError(f"--box {options.box}: two numbers are needed, such as 2x4 ({error})") from None


def _run_in_box(settings: StepSettings, folder: Path) -> int:
    """Run all ranks in a box. Returns the exit code."""
    assert settings.box is not None
    path = folder / "settings.json"
    path.write_text(json.dumps(to_plain(settings)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.step_worker", str(path), str(folder)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_TERMINATED))  # so that the box is torn down on SIGTERM
    try:
        with Box(settings.box) as box:
            box.run(command, env={"OMP_NUM_THREADS": "1"}, timeout_s=_BOX_TIMEOUT_S)
    except BoxError as error:
        print(f"benchmarks.step: error: {error}", file=sys.stderr)
        return _EXIT_FAILURE
    return EXIT_OK


def _run_ranks(settings: StepSettings, folder: Path) -> int:
    """Start all ranks and wait for them. The first one to fail ends the others, and its exit code is returned."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(settings, rank, folder, os.getpid()), daemon=True)
        for rank in range(settings.num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        return _first_failure(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _first_failure(ranks: SequenceOf[BaseProcess]) -> int:
    waiting = list(ranks)
    while waiting:
        ended = wait([rank.sentinel for rank in waiting])
        for rank in [rank for rank in waiting if rank.sentinel in ended]:
            waiting.remove(rank)
            rank.join()
            if rank.exitcode != EXIT_OK:
                return _EXIT_FAILURE if rank.exitcode is None or rank.exitcode < 0 else rank.exitcode
    return EXIT_OK


def run_rank(settings: StepSettings, rank: int, folder: Path, parent_pid: int) -> None:
    """The process of one rank. Only rank 0 prints an error, since the planner's errors reach all ranks."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which kills the ranks
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")  # megatron-core, once per module
    from benchmarks.step_worker import measure_rank  # torch reads its variables here, after the parent set them

    try:
        measure_rank(settings, rank, folder)
    except LonghaulError as error:
        if rank == 0:
            print(f"benchmarks.step: error: {error}", file=sys.stderr)
        leave(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
