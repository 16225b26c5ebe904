"""A tiny float64 decoder trained chunk by chunk on ranks that are threads, and the dense model's gradients."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
import weakref

import numpy as np
import torch

from memory.activations import ActivationMemory
from parallel import comm
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.inputs.model import ModelSpec
from planner.plan import AttentionGroup, AttentionKind
from tests.plans import verified_plan
from tests.ranks import ThreadFabric, run_threads
from tests.trainer import dense
from trainer.data.batch import TokenRows, token_rows
from trainer.model.transformer import Decoder, TensorShard
from trainer.step.chunks import run_chunked

CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="chunks", num_layers=3, hidden_dim=16, ffn_dim=20, num_query_heads=4, num_kv_heads=2, head_dim=4,
    vocab_size=23, qk_norm=True,
)


def make_model(spec=SPEC, dtype=torch.float64, seed=0):
    """Needs a process group in this process."""
    group = comm.new_group([0], timeout_s=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Decoder(spec, TensorShard(0, 1, group), loss_chunk_tokens=7).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return model


def random_documents(lengths, vocab_size=SPEC.vocab_size, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=size + 1) for size in lengths]


def reader(documents, ignored=frozenset(), log=None):
    """Reads spans; tokens of sequences in ``ignored`` carry no loss."""

    def read(spans):
        rows = token_rows([documents[s.sequence][s.start_token : s.stop_token + 1] for s in spans], spans, CPU)
        masked = [torch.full((s.num_tokens,), s.sequence in ignored) for s in spans]
        mask = torch.cat([torch.zeros(0, dtype=torch.bool), *masked])
        if log is not None:
            log.append(len(rows.tokens_T))
        return TokenRows(rows.tokens_T, rows.positions_T, rows.labels_T.masked_fill(mask, -100))

    return read


def group_of(kind, degree, num_sequences):
    return AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=tuple(range(num_sequences)))


def chunked_gradients(model, groups, lengths, policy, read, *, num_ranks, step=0, tiers=None):
    """The same as ``plan_gradients`` for one microbatch of these groups."""
    return plan_gradients(model, verified_plan([groups], lengths, num_ranks), policy, read, step=step, tiers=tiers)


def plan_gradients(model, plan, policy, read, *, step=0, tiers=None):
    """(loss, gradients by name), summed over ranks, each with its own copy of the model and its own of ``tiers``."""
    num_ranks = plan.num_ranks
    fabric = ThreadFabric(num_ranks)

    def rank_main(rank):
        group = model.tensor.group
        local = copy.deepcopy(model, {id(group): group})  # a process group cannot be copied
        runtime = types.SimpleNamespace(
            model=local, chunking=policy, mesh=types.SimpleNamespace(device=CPU, tensor_size=1),
            engine=AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU),
            memory=ActivationMemory(tier=tiers[rank] if tiers else None),
        )
        loss = torch.zeros((), dtype=torch.float64)
        for microbatch in compile_rank_program(plan, rank).microbatches:
            loss += run_chunked(runtime, microbatch, read, step=step, num_tokens=plan.num_tokens)
        return loss, {name: weight.grad for name, weight in local.named_parameters()}

    results = run_threads(num_ranks, rank_main)
    gradients = {
        name: sum(grads[name] for _, grads in results if grads[name] is not None) + torch.zeros_like(weight)
        for name, weight in model.named_parameters()
    }
    return sum(loss for loss, _ in results).item(), gradients


def dense_gradients(model, documents, spec=SPEC, ignored=frozenset()):
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    total = sum(
        dense.document_loss(weights, spec, torch.from_numpy(ids))
        for number, ids in enumerate(documents) if number not in ignored
    )
    (total / sum(len(ids) - 1 for ids in documents)).backward()
    return total.item(), {name: weight.grad for name, weight in weights.items()}


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def worst_error(got, wanted):
    """Largest relative error over parameters, none divided by less than a thousandth of the whole gradient's norm."""
    scale = flat(wanted).norm().item()
    return max(
        (got[name] - grad).norm().item() / max(grad.norm().item(), 1e-3 * scale) for name, grad in wanted.items()
    )


@dataclasses.dataclass(eq=False)
class Held:
    """What autograd keeps in place of a tensor."""

    tensor: torch.Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Most bytes that autograd holds at once, parameters left out, plus ``extra()`` at that time."""

    def __init__(self, parameters, extra=lambda: 0):
        self.skipped = {weight.untyped_storage().data_ptr() for weight in parameters}
        self.extra, self.held, self.peak = extra, {}, 0
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer in self.skipped or not storage.nbytes():
            return tensor
        self.held.setdefault(pointer, [0, storage.nbytes()])[0] += 1
        self.peak = max(self.peak, sum(size for _, size in self.held.values()) + self.extra())
        holder = Held(tensor)
        weakref.finalize(holder, self.drop, pointer)
        return holder

    @staticmethod
    def unpack(held):
        return held if isinstance(held, torch.Tensor) else held.tensor

    def drop(self, pointer):
        self.held[pointer][0] -= 1
        if not self.held[pointer][0]:
            del self.held[pointer]


KINDS = (AttentionKind.ULYSSES, AttentionKind.RING)
