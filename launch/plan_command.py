"""``longhaul plan``: what can be asked. ``launch.plan_run`` answers; it is loaded only where it is wanted."""

from __future__ import annotations

import argparse

from launch.arguments import CommandParser
from planner.codec import suggest
from planner.errors import EXIT_OK, SpecError
from planner.inputs.files import cluster_names, model_names
from planner.inputs.length_generators import length_names
from planner.schedules.exchange import attention_names


def run(arguments: list[str]) -> int:
    """Plan, print, and return the exit code. Raises SpecError (2) and InfeasibleError (94), each with one line."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(arguments)
    if flags.help:
        print(parser.format_help(), end="")
        return EXIT_OK
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = suggest(flag, parser._option_string_actions) if flag.startswith("--") else ""
        raise SpecError(f"longhaul plan: unknown argument {unknown[0]!r}{hint}; see longhaul plan --help")
    from launch.plan_run import run_plan  # here: it loads numpy, which --help can do without

    return run_plan(flags)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "longhaul plan",
        "Plan training steps over sequences of these lengths and say whether they fit and what they cost.",
    )
    add = parser.add_argument
    add("--lengths", metavar="FILE|NAME",
        help=f"file with one sequence length (tokens) per line, taken in order; or {', '.join(length_names())}")
    add("--model", default="tiny", metavar="NAME|FILE", help=f"{', '.join(model_names())} or a .yaml file")
    add("--cluster", default="laptop-cpu", metavar="NAME|FILE", help=f"{', '.join(cluster_names())} or a .yaml file")
    add("--cost", metavar="FILE", help="times measured by longhaul calibrate, instead of the cluster's data sheet")
    add("--strategy", default="adaptive", metavar="NAME",
        help="a strategy, or all to compare every one on the same batches (default adaptive)")
    add("--degree", metavar="D", help="ranks per group, for static (default: the best one)")
    add("--attention", default="auto", metavar="KIND", help=f"{', '.join(attention_names())} (default auto)")
    add("--tensor-parallel", metavar="N", help="devices that share every layer of a data rank (default 1)")
    add("--pipeline-parallel", metavar="N", help="pipeline stages of every data rank (default 1)")
    add("--memory", default="keep", metavar="POLICY",
        help="keep (default), swap, recompute, chunk (SeCO, exact), or auto (the best one for each microbatch); "
        "adaptive can use all of them, hdp and hdp-floor only swap")
    add("--batch-sequences", metavar="N", help="sequences per step (default 512)")
    add("--batch-tokens", metavar="N", help="instead: at most this many tokens per step, e.g. 512K")
    add("--max-length", metavar="N", help="drop longer sequences, e.g. 192K (= 196,608 tokens)")
    add("--steps", default="3", metavar="N", help="plan the first N batches (default 3)")
    add("--seed", metavar="N", help="seed for named lengths (default 0)")
    add("--device-budget", metavar="BYTES",
        help='bytes a device may use, e.g. "30 GiB" (default: memory minus reserve)')
    add("--json", metavar="-|FILE", help="write the result as JSON; - prints it and nothing else")
    add("--trace", metavar="FILE", help="write the simulated steps as a trace for ui.perfetto.dev")
    add("--html", metavar="FILE", help="write one page with timeline, lengths, memory and comparison (needs plotly)")
    return parser
