"""A run small enough for tests: a corpus of short documents, a made-up cost model, a model of few weights."""

import json
import random
from pathlib import Path

from planner.codec import to_plain
from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.model import CostModel
from planner.plan import AttentionKind

MODEL = (
    "--model.num-layers", "1", "--model.hidden-dim", "32", "--model.num-query-heads", "4", "--model.num-kv-heads", "2",
    "--model.head-dim", "8", "--model.ffn-dim", "32",
)
SIZES = ("--max-length", "64", "--tokens-per-step", "256")
WORDS = "the plan of a step is a value and the run repeats it exactly once more".split()


def write_corpus(folder: Path, *, num_documents: int = 120) -> Path:
    """Text files of long-tailed length, the longest over ``--max-length``."""
    draw = random.Random(5)
    folder.mkdir(parents=True)
    for index in range(num_documents):
        num_bytes = min(120, max(3, int(draw.lognormvariate(3.0, 1.0))))
        text = " ".join(draw.choice(WORDS) for _ in range(num_bytes))[:num_bytes]
        (folder / f"document-{index:03}.txt").write_text(text)
    return folder


def write_cost(file: Path, *, degrees: tuple[int, ...] = (2, 3, 4)) -> Path:
    """Prices for both attention kinds; one byte a token, so that a device budget is a number of tokens."""
    times = [
        TimeFit(kind=AttentionKind.LOCAL, degree=1, s_per_token2=1e-6, s_per_token=1e-5, s_per_sequence=0.0,
                fixed_s=1e-4)
    ]
    times += [
        TimeFit(kind=kind, degree=degree, s_per_token2=1e-6 / degree, s_per_token=1.3e-5 / degree, s_per_sequence=0.0,
                fixed_s=2e-5 * degree)
        for kind in (AttentionKind.ULYSSES, AttentionKind.RING) for degree in degrees
    ]
    cost = CostModel(
        times=tuple(times), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1.0), step_fixed_s=1e-4,
        peak_flop_per_s=1e9, provenance=Provenance(source="test", cluster="test", model="test"),
    )
    file.write_text(json.dumps(to_plain(cost)))
    return file


def train_arguments(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """``longhaul train`` on what ``write_corpus`` and ``write_cost`` left in ``folder``; later flags win."""
    return [
        "train", "--run-dir", str(run_dir), "--data", str(folder / "corpus"), "--plan.cost", str(folder / "cost.json"),
        *SIZES, *MODEL, *more,
    ]
