"""The ``longhaul`` command. Each verb is imported only when used, so help and planning never load torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.console import error_lines
from planner.codec import suggest
from planner.errors import EXIT_BAD_CONFIG, EXIT_OK, LonghaulError, SpecError

if TYPE_CHECKING:
    from trainer.rank_env import RankEnv
    from trainer.settings.tree import TrainConfig

_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (see ``planner.errors``). User errors are lines on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:  # None if the parent process closed it
            sys.stdout.flush()
        return code
    except LonghaulError as error:
        print(error_lines(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longhaul: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # the reader (head, less) has closed the pipe
        return _EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"longhaul: error: cannot write the output ({error.strerror})", file=sys.stderr)
        return EXIT_BAD_CONFIG


def _discard_output() -> None:
    """Redirect stdout to nowhere: otherwise Python would report the error again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(help_text(), file=sys.stderr)
        return EXIT_BAD_CONFIG
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_OK
    if verb == "--version":
        print(f"longhaul {_version()}")
        return EXIT_OK
    if verb in _VERBS:
        return _VERBS[verb][0](rest)
    if verb in _COMING:
        raise SpecError(f"longhaul {verb}: not built yet ({_COMING[verb]})")
    raise SpecError(f"unknown command {verb!r}{suggest(verb, _VERBS)}; see longhaul --help")


def help_text() -> str:
    """The text that ``longhaul --help`` prints."""
    lines = ["usage: longhaul COMMAND ...", "", "commands (longhaul COMMAND --help says more):"]
    lines += [f"  {name:<10} {what}" for name, (_, what) in _VERBS.items()]
    lines += ["", "coming:"]
    lines += [f"  {name:<10} {what}" for name, what in _COMING.items()]
    lines += ["", "exit codes: 0 done, 1 reproduce: outside its tolerance, 2 bad input, 75 stopped and saved,",
              "            93 do not requeue, 94 no plan fits, 95 loss not finite, 96 no loadable checkpoint,",
              "            130 interrupted, 141 the reader of a pipe has left"]
    return "\n".join(lines)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("longhaul")
    except metadata.PackageNotFoundError:
        return "(not installed, running from a checkout)"


def _train(arguments: list[str]) -> int:
    from launch import doctor, environment

    env = environment.detect()
    config = _resolve(arguments, env)
    doctor.refuse_foreign_names()
    from trainer.preflight import preflight, with_free_run_dir

    if env is None:
        config = with_free_run_dir(config)
    if env is None or env.local_rank == 0:  # other ranks of the node would find the same problems
        preflight(config, environment.cache_root())
    from launch import local, worker

    if env is not None:
        if env.rank == 0:
            local.write_config(config)
        worker.die_with_parent()
        worker.leave(worker.run(config, env, is_watched=False))  # does not return
    return local.launch(config)


def _resolve(arguments: list[str], env: RankEnv | None) -> TrainConfig:
    """The settings of the run. Under torchrun, torchrun sets the number of ranks; a flag that differs is an error."""
    from trainer.settings.resolve import resolve_config

    if env is None:
        return resolve_config(arguments)
    flags = [word.partition("=")[0].replace("_", "-") for word in arguments]
    if not {"--world-size", "--run.world-size"}.intersection(flags):
        return resolve_config([*arguments, "--world-size", str(env.world_size)])
    config = resolve_config(arguments)
    if config.run.world_size != env.world_size:
        raise SpecError(
            f"--world-size {config.run.world_size}: torchrun started {env.world_size} ranks; leave --world-size out"
        )
    return config


def _plan(arguments: list[str]) -> int:
    from launch import plan_command

    return plan_command.run(arguments)


def _reproduce(arguments: list[str]) -> int:
    from launch import reproduce_command

    return reproduce_command.run(arguments)


def _report(arguments: list[str]) -> int:
    from launch import report_command

    return report_command.run(arguments)


def _calibrate(arguments: list[str]) -> int:
    from launch import calibrate_command

    return calibrate_command.run(arguments)


def _doctor(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: longhaul doctor\n\nversions, cores, memory, devices, import names; exit 0 when all is well")
        return EXIT_OK
    from launch import doctor

    return doctor.run(arguments)


_VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a model; without flags a small real run on 4 CPU ranks"),
    "plan": (_plan, "plan steps for given lengths, model and cluster; needs no accelerator and no torch"),
    "reproduce": (_reproduce, "the published tables of the systems implemented here, row by row"),
    "report": (_report, "predicted and measured times of a run, finished or running"),
    "calibrate": (_calibrate, "measure this machine for the planner"),
    "doctor": (_doctor, "check versions, devices and the installation"),
}
_COMING = {
    "slurm": "print a batch script for a recipe",
    "ckpt": "list, verify, import and export checkpoints",
    "data": "index and inspect a corpus",
    "init": "write a recipe to start from",
}


if __name__ == "__main__":
    sys.exit(main())
