"""Environment variables in, values out."""

import os
import sys
from pathlib import Path

import pytest

from launch import environment
from planner.errors import SpecError
from trainer.rank_env import RankEnv

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_outside_of_torchrun_there_is_no_rank() -> None:
    assert environment.detect({"WORLD_SIZE": "4"}) is None


def test_torchrun_is_read() -> None:
    env = environment.detect(TORCHRUN)
    assert env == RankEnv(rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, restart_count=2)
    assert not env.is_single_node


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        ({"LOCAL_RANK": None}, "RANK is set but LOCAL_RANK is not"),
        ({"RANK": "five"}, "environment variable RANK: expected a whole number, got 'five'"),
        ({"RANK": "8"}, "rank 8 does not exist in a world of 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4 does not fit a world of 8"),
    ],
)
def test_contradictions_are_one_line(change: dict[str, str | None], message: str) -> None:
    environ = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(SpecError, match=message):
        environment.detect(environ)


def settings(*, local_world_size: int, num_cores: int, is_single_node: bool = True) -> dict[str, str]:
    return environment.rank_process_settings(
        local_world_size=local_world_size, is_single_node=is_single_node, num_cores=num_cores
    )


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(4, 2, "1"), (4, 4, "1"), (4, 19, "4"), (1, 6, "6")])
def test_ranks_share_the_cores(ranks: int, cores: int, threads: str) -> None:
    assert settings(local_world_size=ranks, num_cores=cores)["OMP_NUM_THREADS"] == threads


def test_gloo_stays_on_this_machine_only_when_all_ranks_are_here() -> None:
    assert "GLOO_SOCKET_IFNAME" not in settings(local_world_size=4, num_cores=4, is_single_node=False)
    if sys.platform.startswith("linux"):
        assert settings(local_world_size=4, num_cores=4)["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_large_blocks_get_huge_pages() -> None:
    assert settings(local_world_size=4, num_cores=4)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    environment.apply({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})
    assert os.environ == {"OMP_NUM_THREADS": "3", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def test_cache_root_prefers_our_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "shared")
    monkeypatch.setenv("LONGHAUL_CACHE", "own")
    assert environment.cache_root() == Path("own")
    monkeypatch.delenv("LONGHAUL_CACHE")
    assert environment.cache_root() == Path("shared/longhaul")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_root() == Path.home() / ".cache" / "longhaul"
