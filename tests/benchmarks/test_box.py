"""The cluster in a box: cards limit what crosses nodes, failures are named, nothing is left behind."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks.box import Box, BoxError, BoxSpec, box_problem

pytestmark = pytest.mark.nightly
RATE = 25e6
SPEC = BoxSpec(num_nodes=2, ranks_per_node=2, nics_per_node=2, nic_bytes_per_s=RATE)

EXCHANGE = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
pairs, num_bytes = eval(sys.argv[1]), 8_000_000
for attempt in range(2):  # the first one makes the connections
    tensor = torch.zeros(num_bytes // 4)
    dist.barrier()
    start_s = time.perf_counter()
    sends = [dist.isend(tensor, b) for a, b in pairs if rank == a]
    receives = [dist.irecv(tensor, a) for a, b in pairs if rank == b]
    for each in sends + receives:
        each.wait()
    dist.barrier()
    elapsed_s = time.perf_counter() - start_s
print("bytes_per_s", len(pairs) * num_bytes / elapsed_s)
dist.destroy_process_group()
"""


@pytest.fixture(autouse=True, scope="module")
def _needs_a_box() -> None:
    problem = box_problem()
    if problem is not None:
        pytest.skip(f"no cluster in a box here: {problem}")


def _namespaces() -> str:
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


def _rate(box: Box, pairs: list[tuple[int, int]]) -> float:
    output = box.run([sys.executable, "-c", EXCHANGE, repr(pairs)], timeout_s=120)[0]
    found = re.search(r"bytes_per_s (\S+)", output)
    assert found, output
    return float(found[1])


def test_cards_limit_what_crosses_nodes_and_nothing_else() -> None:
    with Box(SPEC) as box:
        slack = 1.3  # a bucket lets a burst through
        assert _rate(box, [(0, 2)]) < RATE * slack
        assert RATE < _rate(box, [(0, 2), (1, 3)]) < 2 * RATE * slack
        assert _rate(box, [(0, 1)]) > 2 * RATE
    assert "lhbox" not in _namespaces()


def test_ranks_that_share_a_card_share_its_rate() -> None:
    with Box(BoxSpec(num_nodes=2, ranks_per_node=2, nics_per_node=1, nic_bytes_per_s=RATE)) as box:
        assert _rate(box, [(0, 2), (1, 3)]) < RATE * 1.3


def test_a_rank_computes_at_its_own_speed() -> None:
    program = """
import os, time
end_s = time.time() + 2
while os.environ["RANK"] == "0" and time.time() < end_s:
    pass
print(time.process_time())
"""
    try:
        with Box(BoxSpec(num_nodes=1, ranks_per_node=2, nics_per_node=1, nic_bytes_per_s=RATE, cpu_share=0.2)) as box:
            assert 0.1 < float(box.run([sys.executable, "-c", program], timeout_s=60)[0]) < 0.7
    except BoxError as error:
        pytest.skip(str(error))


def test_a_rank_that_fails_is_named_and_the_others_are_ended() -> None:
    program = "import os, sys, time\nif os.environ['RANK'] == '3': sys.exit('no more tokens')\ntime.sleep(600)"
    with pytest.raises(BoxError, match=r"(?s)rank 3 ended with 1.*no more tokens"), Box(SPEC) as box:
        box.run([sys.executable, "-c", program], timeout_s=60)
    assert "lhbox" not in _namespaces()


def test_a_run_that_does_not_end_is_ended() -> None:
    with pytest.raises(BoxError, match="still running after 2 s"), Box(SPEC) as box:
        box.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=2)


@pytest.mark.parametrize(
    "wrong", [{"num_nodes": 0}, {"nics_per_node": 3}, {"nic_bytes_per_s": 0.0}, {"cpu_share": 0.0}]
)
def test_impossible_boxes_are_refused(wrong: dict[str, float]) -> None:
    values = {"num_nodes": 2, "ranks_per_node": 4, "nics_per_node": 4, "nic_bytes_per_s": RATE, **wrong}
    with pytest.raises(ValueError, match=r"box|cards"):
        BoxSpec(**values)  # type: ignore[arg-type]
