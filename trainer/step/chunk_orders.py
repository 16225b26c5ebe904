"""Chunks where ranks cannot each run their own number of them.

*Pipeline stages.* The forward of a microbatch sends its chunks in order through the stages: each stage stores the K/V
that later chunks read, keeps the hidden states it received, and sends its own to the next stage; the last stage runs
only what must be stored. The backward takes the selected chunks in reverse order: each stage runs a chunk again from
the hidden states it kept, receives the gradient of those it sent, and sends the gradient of those it kept. So between
the two passes a stage holds per token one hidden state and the K/V of its layers.

*Lockstep (``zero3``).* Every forward and backward gathers parameters over all ranks. The groups of a round therefore
run slot by slot (``RankAction.slots``): for each slot, all ranks agree on the largest number of first passes and of
second passes that any of them has, and ranks with fewer run empty ones.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from parallel import comm
from parallel.engine import MicrobatchAttention
from parallel.program import RankMicrobatch
from parallel.stages import StageLink
from planner.plan import Sharding
from trainer.data.batch import token_rows
from trainer.step.chunks import GroupRun, run_chunked
from trainer.step.runtime import ReadSpans, Runtime


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk between its two passes on this stage. ``number``: its number in the microbatch, equal on all stages."""

    run: GroupRun
    index: int
    number: int
    hidden_TD: torch.Tensor | None


class StagedChunks:
    """One microbatch's chunks on one stage. ``link``: None to measure a stage without its neighbours; it then receives
    zeros and takes gradients of one."""

    def __init__(
        self, runtime: Runtime, microbatch: RankMicrobatch, read_spans: ReadSpans, *, step: int, num_tokens: int,
        link: StageLink | None,
    ) -> None:
        self._runtime, self._index, self._num_tokens, self._link = runtime, microbatch.index, num_tokens, link
        self._runs = [
            GroupRun(runtime, microbatch, group, read_spans, step=step, num_tokens=num_tokens)
            for group in microbatch.groups if group.sequences
        ]
        self._kept: list[_Piece] = []

    def forward(self) -> None:
        """The first pass of all chunks in order: receives, stores and sends."""
        number = 0
        for run in self._runs:
            selected = frozenset(run.selected)
            for index in sorted(selected.union(run.stored)):
                hidden_TD = self._receive(run.num_rows(index), number)
                output = run.stage_forward(index, hidden_TD)
                if output is not None and self._link is not None:
                    self._link.send_hidden(self._index, output, number)
                if index in selected:
                    self._kept.append(_Piece(run, index, number, hidden_TD))
                number += 1

    def backward(self) -> torch.Tensor:
        """The second pass of the selected chunks, last one first. Returns the (weighted) sum of own tokens' losses; 0
        on a stage that is not the last."""
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.mesh.device)
        while self._kept:
            piece = self._kept.pop()
            hidden_TD = piece.hidden_TD
            if hidden_TD is not None:
                hidden_TD = hidden_TD.detach().requires_grad_()
            output, weight = piece.run.stage_again(piece.index, hidden_TD), piece.run.loss_weight(piece.index)
            if self._runtime.model.stage.is_last:
                total += output.detach() * weight
                (output * (weight / self._num_tokens)).backward()
            elif self._link is None:
                output.sum().backward()
            else:
                shape = (output.shape[0], output.shape[1])
                output.backward(self._link.receive_gradient(self._index, shape, piece.number))
            if self._link is not None and hidden_TD is not None:
                assert hidden_TD.grad is not None
                self._link.send_gradient(self._index, hidden_TD.grad, piece.number)
        return total

    def _receive(self, num_rows: int, number: int) -> torch.Tensor | None:
        runtime = self._runtime
        if runtime.model.stage.is_first:
            return None
        shape = (num_rows, runtime.model.spec.hidden_dim)
        if self._link is None:
            return torch.zeros(shape, device=runtime.mesh.device, dtype=runtime.compute_dtype)
        return self._link.receive_hidden(self._index, shape, number).detach()


def run_lockstep(
    runtime: Runtime, microbatch: RankMicrobatch | None, slots: SequenceOf[int | None], read_spans: ReadSpans, *,
    step: int, num_tokens: int, run_empty: Callable[[], None],
) -> torch.Tensor:
    """This rank's part of one round of ``zero3``: a microbatch or none. Collective. ``run_empty``: forward and backward
    of zero tokens. Returns this rank's (weighted) sum of token losses."""
    total, has_run = torch.zeros((), dtype=torch.float64, device=runtime.mesh.device), False
    for slot in slots:
        run = None
        if slot is not None and microbatch is not None and microbatch.groups[slot].sequences:
            run = GroupRun(runtime, microbatch, microbatch.groups[slot], read_spans, step=step, num_tokens=num_tokens)
        stored, selected = (run.stored, run.selected) if run is not None else ((), ())
        counts = torch.tensor([len(stored), len(selected)], dtype=torch.int64)
        most_stored, most_selected = comm.all_reduce_max(counts, runtime.mesh.control_group).tolist()
        for place in range(most_stored):
            if run is not None and place < len(stored):
                run.store(stored[place])
            else:
                _forward_nothing(runtime)
        has_run = has_run or most_selected > 0
        for place in range(most_selected):
            if run is not None and place < len(selected):
                total += run.backward(selected[place])
            else:
                run_empty()
        if run is not None:
            run.close()
    if not has_run:  # no sequence, or no chunk drawn on any rank: parameters need gradients nevertheless
        run_empty()
    return total


def run_chunked_alone(
    runtime: Runtime, microbatch: RankMicrobatch | None, read_spans: ReadSpans, run_empty: Callable[[], None]
) -> None:
    """One microbatch (of one group) for measuring, under the run's chunk policy. With ``zero3`` it is collective, and
    ranks without a microbatch take part. Pipeline stages run without their neighbours."""
    if runtime.sharding is Sharding.ZERO3:
        slots = (None if microbatch is None else 0,)
        run_lockstep(runtime, microbatch, slots, read_spans, step=0, num_tokens=1, run_empty=run_empty)
    elif microbatch is None:
        return
    elif runtime.link is None:
        run_chunked(runtime, microbatch, read_spans, step=0, num_tokens=1)
    else:
        chunks = StagedChunks(runtime, microbatch, read_spans, step=0, num_tokens=1, link=None)
        chunks.forward()
        chunks.backward()


@torch.no_grad()
def _forward_nothing(runtime: Runtime) -> None:
    rows = token_rows([], [], runtime.mesh.device)
    runtime.model(rows.tokens_T, rows.positions_T, None, MicrobatchAttention(()))
