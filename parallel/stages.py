"""What a pipeline stage exchanges with its neighbours: hidden states forward, their gradients backward.

Receives block and sends do not, so the order of ``planner.pricing.pipeline_order`` cannot deadlock. Each direction has
its own communicator: on NCCL a send that waits for its receiver would otherwise hold up the message that this receiver
waits for. Sizes are not sent: both ends know the rows of every microbatch from the plan.
Shapes: T rows of a microbatch on this data rank, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from parallel.comm import Exchange, Message, Pending


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLink:
    """This rank's links to the previous and the next stage, on the same data rank.

    Sent hidden states and gradients are kept until ``drain``, or until a message from the receiver proves that they
    have arrived. A microbatch may be sent in several pieces, numbered alike at both ends.
    """

    stage: int
    num_stages: int
    forward_wire: Exchange
    backward_wire: Exchange
    device: torch.device
    dtype: torch.dtype
    _in_flight: dict[tuple[str, int, int], Pending] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def receive_hidden(self, microbatch: int, shape: tuple[int, int], piece: int = 0) -> torch.Tensor:
        """The hidden states ``[T, D]`` of the previous stage, with requires_grad set."""
        hidden_TD = torch.empty(shape, device=self.device, dtype=self.dtype)
        message = Message(self.stage - 1, hidden_TD)
        self.forward_wire.post([], [message], _hidden_to(self.stage, microbatch, piece)).wait()
        return hidden_TD.requires_grad_()

    def send_hidden(self, microbatch: int, hidden_TD: torch.Tensor, piece: int = 0) -> None:
        message = Message(self.stage + 1, hidden_TD.detach().contiguous())
        what = _hidden_to(self.stage + 1, microbatch, piece)
        self._in_flight["hidden", microbatch, piece] = self.forward_wire.post([message], [], what)

    def receive_gradient(self, microbatch: int, shape: tuple[int, int], piece: int = 0) -> torch.Tensor:
        """The gradient ``[T, D]`` of what was sent to the next stage. Its arrival proves that the microbatch's hidden
        states have arrived there, so they are released."""
        gradient_TD = torch.empty(shape, device=self.device, dtype=self.dtype)
        message = Message(self.stage + 1, gradient_TD)
        self.backward_wire.post([], [message], _gradient_to(self.stage, microbatch, piece)).wait()
        self._release("hidden", microbatch)
        return gradient_TD

    def send_gradient(self, microbatch: int, gradient_TD: torch.Tensor, piece: int = 0) -> None:
        message = Message(self.stage - 1, gradient_TD.contiguous())
        what = _gradient_to(self.stage - 1, microbatch, piece)
        self._in_flight["gradient", microbatch, piece] = self.backward_wire.post([message], [], what)

    def gradient_has_arrived(self, microbatch: int) -> None:
        """Release the gradients of a microbatch whose receiver is known to have used them."""
        self._release("gradient", microbatch)

    def _release(self, what: str, microbatch: int) -> None:
        for key in [key for key in self._in_flight if key[:2] == (what, microbatch)]:
            self._in_flight.pop(key).wait()

    def drain(self) -> None:
        """Wait for all sends."""
        for pending in self._in_flight.values():
            pending.wait()
        self._in_flight.clear()


def _hidden_to(stage: int, microbatch: int, piece: int) -> str:
    return f"hidden states of microbatch {microbatch}{_of(piece)} to stage {stage}"


def _gradient_to(stage: int, microbatch: int, piece: int) -> str:
    return f"gradient of microbatch {microbatch}{_of(piece)} to stage {stage}"


def _of(piece: int) -> str:
    return f", piece {piece}," if piece else ""
