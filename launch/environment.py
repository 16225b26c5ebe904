"""Environment variables: read and written here and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from planner.errors import SpecError
from trainer.rank_env import RankEnv

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_SAVE_GRACE_S = 120


def detect(environ: Mapping[str, str] | None = None) -> RankEnv | None:
    """This process's place in a run that ``torchrun`` (or our own launcher) started; None outside of one.

    Raises SpecError when the variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" not in environ:
        return None
    world_size = _integer(environ, "WORLD_SIZE")
    return RankEnv(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=world_size),
        node_rank=_integer(environ, "GROUP_RANK", default=0),
        restart_count=_integer(environ, "TORCHELASTIC_RESTART_COUNT", default=0),
    )


def _integer(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise SpecError(f"RANK is set but {name} is not: start the ranks with torchrun, or unset RANK")
        return default
    try:
        return int(text)
    except ValueError:
        raise SpecError(f"environment variable {name}: expected a whole number, got {text!r}") from None


def rank_process_settings(*, local_world_size: int, is_single_node: bool, num_cores: int) -> dict[str, str]:
    """Variables that every rank's process needs before torch is imported in it."""
    settings = {
        # Ranks that share cores must not each start a thread per core: they would wait for each other all the time.
        "OMP_NUM_THREADS": str(max(1, num_cores // local_world_size)),
        # With torch's shared store a restarted group still finds the addresses of the dead one and never connects.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        # After a stop signal torch's launcher kills the ranks at 30 s by default; writing a checkpoint may take longer.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SAVE_GRACE_S),
    }
    if sys.platform == "linux":
        # Large tensors are mapped one by one (memory.peak): with huge pages that costs few page faults.
        settings["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if is_single_node and sys.platform in _LOOPBACK:
        # A laptop without a network, or with a VPN, resolves its own name to an address that gloo cannot reach.
        settings["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
    return settings


def apply(settings: Mapping[str, str]) -> None:
    """Set these variables for this process and its children; what the user has set already stays."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def num_cores() -> int:
    """Cores that this process may use (a container or scheduler may grant fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def error_file() -> Path | None:
    """Where torch's elastic launcher wants this rank to write why it failed."""
    text = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(text) if text else None


def cache_root() -> Path:
    """Folder for what can be computed again (calibrations, indices): LONGHAUL_CACHE, else the user's cache folder."""
    own = os.environ.get("LONGHAUL_CACHE", "")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "longhaul"
