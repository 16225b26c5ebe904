"""Run peers' steps through the trainer's own ``train_step``; only the attention exchange and the packing are theirs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers.adapters import Attention, Bind, connect
from benchmarks.peers.packing import PeerPlan, pack_batch, rank_program
from benchmarks.peers.systems import PEERS, Peer
from benchmarks.step_results import PeerCheck, PeerMisfit, peer_name
from memory.chunked_loss import IGNORE
from parallel import comm
from parallel.kernel import choose_kernel
from parallel.program import RankMicrobatch, RankProgram
from planner.errors import SpecError
from planner.plan import Span
from trainer.data.batch import TokenRows
from trainer.step.one_step import accumulate_gradients
from trainer.step.runtime import ReadSpans, Runtime

_TIMEOUT_S = 600.0
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class _PeerEngine:
    """Takes the place of the trainer's attention engine. ``attentions``: one for each microbatch of this rank."""

    attentions: tuple[Attention, ...]

    def bind(self, microbatch: RankMicrobatch, **heads: int) -> Attention:
        return self.attentions[microbatch.index]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStep:
    """One batch, ready to run on this rank."""

    plan: PeerPlan
    program: RankProgram
    runtime: Runtime
    pack_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSystem:
    """One peer at one degree: its name in the report and a step for each batch."""

    name: str
    peer: Peer
    steps: tuple[PeerStep, ...]


def make_peers(
    names: SequenceOf[str], runtime: Runtime, batches: tuple[tuple[int, ...], ...], *, capacity_tokens: int
) -> tuple[tuple[PeerSystem, ...], tuple[PeerMisfit, ...]]:
    """Every peer at every degree above 1 that divides the ranks, that the peer can run, and at which all batches fit in
    ``capacity_tokens`` tokens a rank; and the other degrees, each with the reason. Collective. Raises SpecError where a
    peer is not installed."""
    num_ranks, systems, misfits = runtime.mesh.world_size, [], []
    for degree in [degree for degree in range(2, num_ranks + 1) if num_ranks % degree == 0]:
        group: comm.Group | None = None
        for name in names:
            peer = PEERS[name]
            problem = peer.problem()
            if problem is not None:
                raise SpecError(f"--peers {name}: {problem}")
            if not peer.can_split(runtime.model.spec, degree):
                misfits.append(PeerMisfit(name=peer_name(name, degree), reason="heads do not divide"))
                continue
            plans = [_pack(peer, runtime, lengths, degree, capacity_tokens) for lengths in batches]
            num_over = sum(plan is None for plan, _ in plans)
            if num_over:
                misfits.append(PeerMisfit(
                    name=peer_name(name, degree), reason=f"the longest sequence of {num_over} of {len(batches)} batches"
                ))
                continue
            group = _make_group(runtime, degree) if group is None else group
            kernel = choose_kernel(runtime.mesh.device, runtime.compute_dtype)
            bind = connect(name, group, kernel, runtime.mesh.device)
            steps = tuple(
                _prepare(plan, number, runtime, bind, pack_s)
                for number, (plan, pack_s) in enumerate(plans) if plan is not None
            )
            systems.append(PeerSystem(name=peer_name(name, degree), peer=peer, steps=steps))
    return tuple(systems), tuple(misfits)


def _pack(
    peer: Peer, runtime: Runtime, lengths: tuple[int, ...], degree: int, capacity_tokens: int
) -> tuple[PeerPlan | None, float]:
    start_s = time.perf_counter()
    plan = pack_batch(
        lengths, kind=peer.kind, degree=degree, num_ranks=runtime.mesh.world_size, capacity_tokens=capacity_tokens,
        work=runtime.model.spec.model_flop,
    )
    return plan, time.perf_counter() - start_s


def _make_group(runtime: Runtime, degree: int) -> comm.Group:
    """The group of consecutive ranks that has this rank. All ranks make all groups, in the same order."""
    starts = range(0, runtime.mesh.world_size, degree)
    groups = [comm.new_group(list(range(first, first + degree)), timeout_s=_TIMEOUT_S) for first in starts]
    return groups[runtime.mesh.rank // degree]


def _prepare(plan: PeerPlan, number: int, runtime: Runtime, bind: Bind, pack_s: float) -> PeerStep:
    mine = plan.groups[runtime.mesh.rank // plan.degree]
    engine = _PeerEngine(tuple(bind(microbatch.lengths) for microbatch in mine))
    return PeerStep(
        plan=plan, program=rank_program(plan, number, runtime.mesh.rank), pack_s=pack_s,
        runtime=dataclasses.replace(runtime, engine=engine),  # type: ignore[arg-type]
    )


def padded_reader(documents: SequenceOf[npt.NDArray[np.int64]], device: torch.device) -> ReadSpans:
    """A reader of spans of documents (each with one token more than its length, the last label). Rows behind the end of
    a document are padding: token 0 without a label. The document after the last one is only padding."""

    def read(spans: tuple[Span, ...]) -> TokenRows:
        parts = [_span_rows(documents, span) for span in spans]
        rows = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)
        tokens_T, positions_T, labels_T = torch.from_numpy(rows).to(device)
        return TokenRows(tokens_T=tokens_T, positions_T=positions_T, labels_T=labels_T)

    return read


def _span_rows(documents: SequenceOf[npt.NDArray[np.int64]], span: Span) -> npt.NDArray[np.int64]:
    """``[3, T]``: tokens, positions, labels."""
    rows = np.zeros((3, span.num_tokens), dtype=np.int64)
    rows[1] = np.arange(span.start_token, span.stop_token)
    rows[2] = IGNORE
    if span.sequence < len(documents):
        ids = documents[span.sequence][span.start_token : span.stop_token + 1]
        num_real = max(0, len(ids) - 1)
        rows[0, :num_real], rows[2, :num_real] = ids[:-1], ids[1:]
    return rows


def check_gradients(
    systems: SequenceOf[PeerSystem], runtime: Runtime, program: RankProgram, read: ReadSpans, read_padded: ReadSpans
) -> tuple[PeerCheck, ...]:
    """Compare every peer's loss and gradients of the first batch with those of Longhaul's own plan of it (``program``).
    Collective. All gradients are dropped afterwards."""
    num_tokens = systems[0].steps[0].plan.num_tokens if systems else 0
    own_loss, own = _gradients(runtime, program, read, num_tokens) if systems else (0.0, [])
    checks = []
    for system in systems:
        step = system.steps[0]
        loss, theirs = _gradients(step.runtime, step.program, read_padded, num_tokens)
        right = str(runtime.compute_dtype) not in system.peer.wrong_gradients
        checks.append(PeerCheck(
            name=system.name, loss_error=abs(loss / own_loss - 1), gradient_error=_difference(own, theirs, runtime),
            gradients_meant_right=right,
        ))
    return tuple(checks)


def _gradients(
    runtime: Runtime, program: RankProgram, read: ReadSpans, num_tokens: int
) -> tuple[float, list[torch.Tensor]]:
    """The loss, and this rank's shards of the summed gradients."""
    loss_sum, _ = accumulate_gradients(runtime, program, read, num_tokens=num_tokens)
    total = comm.all_reduce_sum(torch.tensor([loss_sum], dtype=torch.float64), runtime.mesh.control_group)
    shards = []
    for parameter in runtime.model.parameters():
        assert parameter.grad is not None, "every parameter has a gradient after a step"
        shards.append(parameter.grad.to_local().clone())  # type: ignore[attr-defined]
    runtime.optimizer.zero_grad()
    return float(total) / num_tokens, shards


def _difference(own: list[torch.Tensor], theirs: list[torch.Tensor], runtime: Runtime) -> float:
    """The largest |difference| of any parameter's gradient over all ranks, relative to that parameter's largest
    |gradient|."""
    sizes = torch.stack([torch.stack((_largest(mine), _largest(mine - other))) for mine, other in zip(
        own, theirs, strict=True
    )])
    highest = comm.all_reduce_max(sizes, runtime.mesh.control_group)
    return float((highest[:, 1] / highest[:, 0]).max())


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max().double().cpu() if tensor.numel() else torch.zeros((), dtype=torch.float64)
