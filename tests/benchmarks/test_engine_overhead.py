"""The overhead benchmark compares equal work, and notices where it does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import engine_overhead
from benchmarks.engine_overhead import main, markdown, measure, ring_case, zone_case
from parallel.kernel import CpuFlashKernel

SHAPE = {"device": torch.device("cpu"), "heads": (4, 2), "head_dim": 8, "repeats": 1}


@pytest.mark.parametrize("case", [ring_case(64, 2), ring_case(70, 8), zone_case(128)], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_compute_the_same(case, dtype):
    found = measure(case, dtype=dtype, **SHAPE)
    assert found.call_s > 0 and found.engine_s > 0 and found.ratio > 0 and found.pieces_ratio > 0
    # 2 products of 2 FLOPs, 3.5 times, over the causal half of the scores
    assert found.flop == 3.5 * 2 * sum(size**2 for size in case.lengths) * 4 * 8


def test_zones_use_all_kinds_of_groups_on_all_ranks():
    case = zone_case(256)
    assert sum(case.lengths) == 256
    assert sorted({group.degree for group in case.groups}) == [1, 4, 8]
    for rank in range(case.num_ranks):
        assert sum(rank in group.ranks for group in case.groups) == 3


def test_lost_messages_are_noticed(monkeypatch):
    def forget(self):
        for message in self.receives:
            message.tensor.zero_()

    monkeypatch.setattr(engine_overhead._PendingCopies, "wait", forget)
    with pytest.raises(ValueError, match="ring of 4.*results differ"):
        measure(ring_case(64, 4), dtype=torch.float32, **SHAPE)


def test_a_failing_rank_ends_the_others(monkeypatch):
    def fail(self, *arguments):
        raise RuntimeError("kernel broke")

    with monkeypatch.context() as patch:
        patch.setattr(CpuFlashKernel, "backward", fail)
        turn = engine_overhead.Turn()
        inputs = tuple(torch.randn(64, heads, 8) for heads in (4, 2, 2, 4))
        ranks = engine_overhead.make_ranks(ring_case(64, 4), CpuFlashKernel(), inputs, turn)
        with pytest.raises(RuntimeError, match="kernel broke"):
            engine_overhead.run_ranks(ranks, turn)


def test_report(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "report.md"
    try:
        assert main(f"--tokens 64 96 --heads 2 --kv-heads 1 --head-dim 8 --repeats 1 --out {path}".split()) == 0
    finally:
        torch.set_num_threads(threads)
    text = path.read_text()
    for name in ("ring of 8", "zones on 8"):
        for size, num_dtypes in ((64, 2), (96, 1)):  # on a CPU both dtypes, one alone at the largest size
            assert text.count(f"| {name} | {size} |") == (1 if torch.cuda.is_available() else num_dtypes)
    assert "2 query and 1 KV heads of 8" in text


def test_goal_is_judged():
    found = measure(ring_case(32, 2), dtype=torch.float32, **SHAPE)
    for ratio, verdict in ((1.1, "met"), (1.11, "NOT met")):
        outcome = engine_overhead.Outcome(
            case=found.case, dtype=found.dtype, call_s=1.0, engine_s=ratio, ratio=ratio, pieces_ratio=1.0,
            copies_ratio=0.04, flop=2e12, difference=0.0
        )
        text = markdown([outcome], [])
        assert f"| 2.000 | {ratio:.4f} | {ratio:.3f} | +0.000 | +0.040 | {ratio - 1.04:+.3f} | {verdict} |" in text
        assert f"32 tokens: {verdict}." in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--heads 3 --kv-heads 2", "not a multiple"), ("--tokens 8", "at least 32"), ("--out no/such/file", "not exist")],
)
def test_bad_arguments(arguments, said, capsys):
    assert main(arguments.split()) == 2
    assert said in capsys.readouterr().err
