"""``longhaul calibrate``: measure this machine for a model and write a file that runs can use."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

from planner.cost.machine_profile import MACHINE_FILE
from planner.errors import EXIT_OK, SpecError


def run(arguments: list[str]) -> int:
    """Start the ranks, measure, and write ``--out``. All other arguments are those of ``longhaul train``. Returns the
    exit code; raises SpecError for wrong arguments or an output file that cannot be written."""
    parser = argparse.ArgumentParser(
        prog="longhaul calibrate",
        description="Measure this machine: attention, linear layers, all-to-all and point-to-point by size, and whole "
        "microbatches of the model. Use the file with `longhaul train --plan.cost machine.yaml`.",
        epilog="All other arguments are those of `longhaul train`: --model.preset, --world-size, --dtype, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, help="file to write, YAML")
    options, rest = parser.parse_known_args(arguments)
    from trainer.settings.resolve import resolve_config

    config = resolve_config(rest)
    if not options.out.parent.is_dir():
        raise SpecError(f"--out {options.out}: folder {options.out.parent} does not exist")
    from launch import local

    with tempfile.TemporaryDirectory(prefix="longhaul-calibrate-") as folder:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
        code = local.launch(config, worker_module="launch.calibrate_worker")
        if code == EXIT_OK:
            try:
                shutil.copyfile(Path(folder) / MACHINE_FILE, options.out)
            except OSError as error:
                raise SpecError(f"--out {options.out}: cannot be written ({error.strerror})") from None
            print(f"written: {options.out}")
    return code
