"""The only module that reads or writes environment variables."""

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
    """This process's ranks in a run that ``torchrun`` (or our own launcher) started; None outside of one.

    Raises SpecError if the variables are incomplete or contradict each other.
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
    """Variables that every rank's process needs before it imports torch."""
    settings = {
        # Ranks share the cores. With one thread per core in every rank, threads would constantly wait for each other.
        "OMP_NUM_THREADS": str(max(1, num_cores // local_world_size)),
        # With torch's shared store, restarted ranks would find the addresses of the dead ones and never connect.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        # After a stop signal torch's launcher kills ranks after 30 s by default; a checkpoint may take longer.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SAVE_GRACE_S),
    }
    if sys.platform == "linux":
        # Large tensors are mapped one by one (memory.peak); huge pages keep the number of page faults low.
        settings["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if is_single_node and sys.platform in _LOOPBACK:
        # A laptop without a network, or with a VPN, resolves its own name to an address that gloo cannot reach.
        settings["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
    return settings


def apply(settings: Mapping[str, str]) -> None:
    """Set these variables for this process and its children, except those that the user has set."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def num_cores() -> int:
    """Cores that this process may use (a container or scheduler may grant fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def error_file() -> Path | None:
    """The file in which torch's elastic launcher expects this rank's reason for a failure."""
    text = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(text) if text else None


def cache_root() -> Path:
    """Folder for data that can be recomputed (calibrations, indices): LONGHAUL_CACHE, else the user's cache folder."""
    own = os.environ.get("LONGHAUL_CACHE", "")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "longhaul"
