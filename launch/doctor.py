"""Checks whether this machine can train: versions, devices, and whether our import names are really ours."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from pathlib import Path

from launch import environment
from planner.errors import EXIT_OK, LonghaulError, SpecError
from planner.units import KIB, format_bytes

DISTRIBUTION = "longhaul"
IMPORT_NAMES = ("planner", "parallel", "memory", "trainer", "launch")
_REQUIRED = (
    "torch", "megatron-core", "pulp", "highspy", "numpy", "tyro", "PyYAML", "rich", "safetensors", "tokenizers",
)
_OPTIONAL = ("flash-attn", "nvidia-ml-py")


def run(arguments: list[str]) -> int:
    """``longhaul doctor``: print the findings and a one-line verdict. Returns 0 if training can start, else 1."""
    if arguments:
        raise SpecError(f"longhaul doctor takes no arguments, got {arguments[0]!r}")
    problems = check_import_names()
    rows = [("python", platform.python_version()), *_versions(problems), *_machine(), *_devices(problems)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for problem in problems:
        print(f"problem: {problem}")
    print("verdict: ready to train" if not problems else f"verdict: not ready ({len(problems)} problem(s) above)")
    return 1 if problems else EXIT_OK


def check_import_names() -> list[str]:
    """One line for each of our import names that another distribution owns or that resolves to another folder.

    pip lets several distributions install folders of the same name over each other without a warning. Imports nothing;
    works for an installed package and for a checkout on the path.
    """
    owners = metadata.packages_distributions()
    root = Path(__file__).resolve().parent.parent
    problems = []
    for name in IMPORT_NAMES:
        others = sorted({owner for owner in owners.get(name, ()) if owner.lower() != DISTRIBUTION})
        if others:
            problems.append(foreign_owner_message(name, others))
            continue
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != root:
            problems.append(
                f"import name {name!r} resolves to {origin or 'nothing'} instead of {root / name}: remove the other "
                "one from the path, or use a clean virtual environment"
            )
    return problems


def foreign_owner_message(name: str, owners: list[str]) -> str:
    return (
        f"import name {name!r} is also installed by {', '.join(owners)}: "
        f"uninstall it and reinstall {DISTRIBUTION}, or use a clean virtual environment"
    )


def _versions(problems: list[str]) -> list[tuple[str, str]]:
    rows = [(DISTRIBUTION, _version(DISTRIBUTION) or "not installed (running from a checkout)")]
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            problems.append(f"{name} is not installed: pip install {DISTRIBUTION}, or pip install -e . in a checkout")
        rows.append((name, version or "missing"))
    rows += [(name, _version(name) or "not installed (optional)") for name in _OPTIONAL]
    return rows


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> list[tuple[str, str]]:
    return [
        ("cores", str(environment.num_cores())),
        ("memory", _memory()),
        ("platform", platform.platform()),
        ("cache", str(environment.cache_root())),
    ]


def _memory() -> str:
    """Total and available bytes of host memory, if the system reports them (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "unknown"
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return f"{format_bytes(kib['MemTotal'] * KIB)}, {format_bytes(kib['MemAvailable'] * KIB)} available"


def _devices(problems: list[str]) -> list[tuple[str, str]]:
    """Communication backends and CUDA devices. Imports torch, which takes a few seconds."""
    if _version("torch") is None:
        return []
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a shared library for another CUDA release
        problems.append(f"torch cannot be imported: {error}")
        return []
    if not dist.is_available():
        problems.append("this build of torch has no torch.distributed")
        return []
    backends = [name for name, is_there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
                if is_there]
    if "gloo" not in backends:
        problems.append("this build of torch has no gloo backend: ranks on CPUs cannot talk to each other")
    rows = [("backends", ", ".join(backends) or "none")]
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows.append(("cuda devices", str(num_devices)))
    return rows + (_cuda_rows() if num_devices else [])


def _cuda_rows() -> list[tuple[str, str]]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [("nvml", f"not available: {error}")]
    try:
        rows = [("cuda driver", str(pynvml.nvmlSystemGetDriverVersion()))]
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            free = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
            rows.append((f"cuda {index}", f"{pynvml.nvmlDeviceGetName(handle)}, {free}"))
        return rows
    finally:
        pynvml.nvmlShutdown()


def refuse_foreign_names() -> None:
    """Called at the start of a run, before anything else is imported. Raises LonghaulError with one line."""
    problems = check_import_names()
    if problems:
        raise LonghaulError(problems[0])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
