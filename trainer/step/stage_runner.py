"""Runs the forwards and backwards of one rank's stage, in the order of its program."""

from __future__ import annotations

import torch

from parallel.program import RankAction, RankMicrobatch, RankProgram
from parallel.stages import StageLink
from planner.plan import Sharding
from trainer.step.chunk_orders import StagedChunks, run_lockstep
from trainer.step.chunks import chunking_of, run_chunked
from trainer.step.runtime import (
    ReadSpans,
    Runtime,
    bind_attention,
    bind_memory,
    memory_policy,
    run_empty_microbatch,
)
from trainer.step.static_plan import begin_microbatch, microbatch_kind


class StageRunner:
    """Runs forwards and backwards of one stage and keeps the results of forwards for their backwards."""

    def __init__(self, runtime: Runtime, program: RankProgram, read_spans: ReadSpans, num_tokens: int) -> None:
        self._runtime = runtime
        self._program = program
        self._read_spans = read_spans
        self._num_tokens = num_tokens
        self._in_flight: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}  # (stage's input, output) by place
        self._in_chunks: dict[int, StagedChunks] = {}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.mesh.device)

    def forward(self, place: int) -> None:
        runtime, microbatch = self._runtime, self._program.microbatches[place]
        runtime.clock.begin(microbatch.index)
        self._begin_plan(place, microbatch)
        if chunking_of(runtime, microbatch) is not None:
            self._forward_in_chunks(place, microbatch)
            runtime.clock.turn()
            return
        rows, link, hidden_TD = self._read_spans(microbatch.spans), runtime.link, None
        if link is not None and not link.is_first:
            hidden_TD = link.receive_hidden(microbatch.index, self._shape(microbatch))
            self._release_arrived_gradients(place, link)
        attention = bind_attention(runtime, microbatch)
        memory = bind_memory(runtime, memory_policy(runtime, microbatch), microbatch.num_rows)
        output = runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention, hidden_TD, memory)
        if link is not None and not link.is_last:
            link.send_hidden(microbatch.index, output)
        else:
            self.loss_sum.add_(output.detach())
        self._in_flight[place] = hidden_TD, output
        runtime.clock.turn()

    def backward(self, place: int) -> None:
        link, microbatch = self._runtime.link, self._program.microbatches[place]
        self._runtime.clock.resume(microbatch.index)
        if chunking_of(self._runtime, microbatch) is not None:
            if place in self._in_chunks:
                self.loss_sum.add_(self._in_chunks.pop(place).backward())
            self._end_plan()
            self._runtime.clock.end()
            return
        hidden_TD, output = self._in_flight.pop(place)
        if link is not None and not link.is_last:
            output.backward(link.receive_gradient(microbatch.index, self._shape(microbatch)))
        else:
            (output / self._num_tokens).backward()
        if link is not None and hidden_TD is not None:
            assert hidden_TD.grad is not None
            link.send_gradient(microbatch.index, hidden_TD.grad)
        del hidden_TD, output
        if self._runtime.memory.recorder is not None:
            self._runtime.memory.recorder.end()
        self._end_plan()
        self._runtime.clock.end()

    def in_lockstep(self, action: RankAction) -> bool:
        """Whether the action's round runs group by group in lockstep (see ``trainer.step.chunk_orders``)."""
        runtime = self._runtime
        return runtime.sharding is Sharding.ZERO3 and (runtime.chunking is not None or action.in_chunks)

    def lockstep(self, action: RankAction) -> None:
        """Run the forward and backward of a round, with this rank's microbatch or with none."""
        runtime, program = self._runtime, self._program
        microbatch = None if action.place is None else program.microbatches[action.place]
        if microbatch is not None:
            runtime.clock.begin(microbatch.index)
        self.loss_sum.add_(run_lockstep(
            runtime, microbatch, action.slots, self._read_spans, step=program.step, num_tokens=self._num_tokens,
            run_empty=lambda: run_empty_microbatch(runtime),
        ))
        if microbatch is not None:
            runtime.clock.turn()
            runtime.clock.resume(microbatch.index)
            runtime.clock.end()

    def _forward_in_chunks(self, place: int, microbatch: RankMicrobatch) -> None:
        """Without pipeline stages this runs both passes, because the backward comes next anyway."""
        runtime, step, num_tokens = self._runtime, self._program.step, self._num_tokens
        if runtime.link is None:
            self.loss_sum.add_(run_chunked(runtime, microbatch, self._read_spans, step=step, num_tokens=num_tokens))
            return
        chunks = StagedChunks(
            runtime, microbatch, self._read_spans, step=step, num_tokens=num_tokens, link=runtime.link
        )
        chunks.forward()
        self._in_chunks[place] = chunks
        if not runtime.link.is_first:
            self._release_arrived_gradients(place, runtime.link)

    def _release_arrived_gradients(self, place: int, link: StageLink) -> None:
        """Release gradients that the previous stage has used: its limit of forwards in flight made it run their
        backwards before the forward whose hidden states just arrived."""
        arrived = place - (link.num_stages - (link.stage - 1))
        if arrived >= 0:
            link.gradient_has_arrived(self._program.microbatches[arrived].index)

    def _begin_plan(self, place: int, microbatch: RankMicrobatch) -> None:
        runtime, arena = self._runtime, self._runtime.memory.arena
        if arena is not None:  # without pipeline stages a microbatch's backward follows its forward
            kind = microbatch_kind(
                microbatch, memory_policy(runtime, microbatch), is_first=place == 0,
                loss_chunk_tokens=runtime.model.loss_chunk_tokens, is_whole=chunking_of(runtime, microbatch) is None,
                mlp_chunk_tokens=runtime.model.mlp_chunk_tokens,
            )
            begin_microbatch(arena, kind, microbatch.num_rows, runtime.mesh.device)

    def _end_plan(self) -> None:
        if self._runtime.memory.arena is not None:
            self._runtime.memory.arena.end()

    def _shape(self, microbatch: RankMicrobatch) -> tuple[int, int]:
        return microbatch.num_rows, self._runtime.model.spec.hidden_dim
