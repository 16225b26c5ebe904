"""Stage links: what arrives is what was sent, and nothing in flight is kept for longer than needed."""

from __future__ import annotations

import pytest
import torch

from parallel.stages import StageLink
from tests.ranks import ThreadFabric, run_threads


def link(stage, num_stages, forward, backward):
    return StageLink(
        stage=stage, num_stages=num_stages, forward_wire=forward.wire(stage), backward_wire=backward.wire(stage),
        device=torch.device("cpu"), dtype=torch.float32,
    )


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_hidden_states_and_gradients_travel(rows):
    num_stages = 3
    forward, backward = ThreadFabric(num_stages), ThreadFabric(num_stages)

    def run(stage):
        own = link(stage, num_stages, forward, backward)
        hidden = torch.arange(rows * 2.0).view(rows, 2)
        if not own.is_first:
            hidden = own.receive_hidden(5, (rows, 2))
            assert hidden.requires_grad
        if not own.is_last:
            own.send_hidden(5, hidden + 1)
            gradient = own.receive_gradient(5, (rows, 2))
        else:
            gradient = torch.ones(rows, 2)
        if not own.is_first:
            own.send_gradient(5, gradient * 2)
            own.gradient_has_arrived(5)
        own.drain()
        assert not own._in_flight
        return hidden.detach(), gradient

    results = run_threads(num_stages, run)
    for stage, (hidden, gradient) in enumerate(results):
        assert torch.equal(hidden, torch.arange(rows * 2.0).view(rows, 2) + stage)
        assert torch.equal(gradient, torch.full((rows, 2), 2.0 ** (num_stages - 1 - stage)))
