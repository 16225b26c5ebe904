"""``longhaul plan --lengths``: files and named distributions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.plan_command import _parser, run
from launch.plan_job import read_job
from planner.errors import SpecError
from tests.launch.plan_cases import planned

NAMED = ("--lengths", "prolong", "--max-length", "4K", "--strategy", "static", "--degree", "4")


def test_max_length_drops_and_says_so(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [int(line) for line in Path(lengths).read_text().split()]
    kept = [size for size in sizes if size <= 200]
    assert 0 < len(kept) < len(sizes)
    run(["--lengths", lengths, "--max-length", "200", "--strategy", "static"])
    assert f"{len(sizes) - len(kept)} of {len(sizes)} sequences over 200 tokens dropped" in capsys.readouterr().out
    result = planned(capsys, "--lengths", lengths, "--max-length", "200", "--strategy", "static")
    assert result["steps"][0]["num_tokens"] == sum(kept)


def test_a_lengths_file_may_begin_with_a_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xef\xbb\xbf100\r\n200\r\n")
    assert planned(capsys, "--lengths", str(path), "--strategy", "static")["steps"][0]["num_tokens"] == 300


def test_named_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, *NAMED, "--steps", "2")
    assert [step["num_sequences"] for step in result["steps"]] == [512, 512]
    mean = sum(step["num_tokens"] for step in result["steps"]) / 1024
    assert mean == pytest.approx(3052 * 0.4812 / 0.8034, rel=0.1)  # documents up to 4K: their tokens over their number
    assert planned(capsys, *NAMED, "--steps", "1")["steps"][0]["num_tokens"] == result["steps"][0]["num_tokens"]
    other = planned(capsys, *NAMED, "--steps", "1", "--seed", "7")
    assert other["steps"][0]["num_tokens"] != result["steps"][0]["num_tokens"]
    assert run([*NAMED, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "lengths prolong: quantiles of 77,932 documents" in out and "sequences over 4096 tokens dropped" in out
    with pytest.raises(SpecError, match="the shortest of prolong has 575 tokens"):
        run(["--lengths", "prolong", "--max-length", "500"])


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 30_000), num_steps=st.integers(1, 4))
def test_enough_is_drawn_for_batches_of_tokens(num_tokens: int, num_steps: int) -> None:
    flags = ["--lengths", "wikipedia", "--batch-tokens", str(num_tokens), "--steps", str(num_steps)]
    batches = read_job(_parser().parse_args(flags)).batches
    longer = read_job(_parser().parse_args([*flags[:-1], str(num_steps + 1)])).batches
    assert len(batches) == num_steps and longer[:num_steps] == batches
    assert all(sum(batch) <= num_tokens or len(batch) == 1 for batch in batches)
