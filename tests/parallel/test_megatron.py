"""A stock GPTModel with Longhaul's attention equals the same GPTModel on one process, one document at a time.

The model code that runs here is the code of ``docs/megatron.md``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional

from parallel import comm
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.megatron import LonghaulCoreAttention, pack_microbatch, with_longhaul_attention
from parallel.program import compile_rank_program
from parallel.rotary import RotaryTable
from planner.cost.limits import PlanLimits
from planner.errors import SpecError
from planner.plan import AttentionGroup, AttentionKind
from planner.pricing.assemble import GroupChoice
from planner.step_planner import plan_step
from tests.parallel.engine_cases import SHARED_KINDS, make_case
from tests.plans import cost_model, step_problem, verified_plan
from tests.ranks import RankPool, ThreadFabric
from tests.trainer import dense

CPU = torch.device("cpu")
VOCAB_SIZE, MAX_LENGTH = 64, 256
LENGTHS = (150, 61, 44, 33, 17, 9, 3, 1)


def make_config(tensor_size=1, dtype=torch.float32, **changes):
    return TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        normalization="RMSNorm", add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
        use_cpu_initialization=True, params_dtype=dtype, pipeline_dtype=dtype,
        tensor_model_parallel_size=tensor_size, gradient_accumulation_fusion=False, **changes,
    )


def documents():
    rng = np.random.default_rng(5)
    return [torch.from_numpy(rng.integers(0, VOCAB_SIZE, size=size + 1)) for size in LENGTHS]


def fill_weights(model, tensor_rank, tensor_size):
    """The same full weights whatever the tensor parallelism: each parameter drawn whole, then cut."""
    for place, (_, parameter) in enumerate(sorted(model.named_parameters())):
        cut = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if cut >= 0:
            shape[cut] *= tensor_size
        generator = torch.Generator().manual_seed(place)
        full = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2 + float(len(shape) == 1)
        parameter.data.copy_(full.chunk(tensor_size, dim=cut)[tensor_rank] if cut >= 0 else full)


def doc_blocks():
    text = Path(__file__).resolve().parents[2].joinpath("docs/megatron.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_documented_code(rank, world_size, init_method, tensor_size, plan, dtype, changes):
    """Executes the blocks of docs/megatron.md. (loss sum of this data rank, gradients by name, tensor rank)."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_size)
    try:
        return _run_blocks(rank, world_size, tensor_size, plan, dtype, changes)
    finally:
        parallel_state.destroy_model_parallel()


def _run_blocks(rank, world_size, tensor_size, plan, dtype, changes):
    ids = documents()

    def read_tokens(spans):
        tokens = [ids[s.sequence][s.start_token : s.stop_token] for s in spans] or [torch.zeros(0, dtype=torch.int64)]
        labels = [ids[s.sequence][s.start_token + 1 : s.stop_token + 1] for s in spans] or tokens
        return torch.cat(tokens)[None], torch.cat(labels)[None]

    space = {
        "rank": rank, "world_size": world_size, "tensor_size": tensor_size, "device": CPU, "plan": plan,
        "config": make_config(tensor_size, dtype, **changes), "vocab_size": VOCAB_SIZE, "max_length": MAX_LENGTH,
        "read_tokens": read_tokens,
    }
    imports, setup, step = doc_blocks()
    exec(imports, space)
    exec(setup, space)
    model, mesh = space["model"], space["mesh"]
    fill_weights(model, mesh.tensor_rank, tensor_size)
    for parameter in model.parameters():  # a rank may have no microbatch at all
        parameter.grad = torch.zeros_like(parameter)
    exec(step, space)
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return space["loss_sum"].item(), gradients, mesh.tensor_rank


class DenseCore(torch.nn.Module):
    """The oracle's core attention: one whole document, RoPE and softmax as in ``tests.trainer.dense``."""

    def __init__(self, config, layer_number, **_):
        super().__init__()
        self.rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])

    def forward(self, query, key, value, attention_mask, /, **_):
        turn = dense.rotate if self.rotates else lambda x, theta: x
        out = dense.attention(turn(query[:, 0], 10_000.0), turn(key[:, 0], 10_000.0), value[:, 0])
        return out.flatten(1).unsqueeze(1)


def run_oracle(rank, world_size, init_method, dtype, changes):
    """The dense model: (sum of token losses, gradients of their mean by name)."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    parallel_state.initialize_model_parallel()
    try:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=DenseCore)
        config = make_config(dtype=dtype, **changes)
        model = GPTModel(config, spec, VOCAB_SIZE, MAX_LENGTH, position_embedding_type="none")
        fill_weights(model, 0, 1)
        total = 0.0
        for ids in documents():
            logits = model(ids[None, :-1], torch.arange(len(ids) - 1)[None], None)[0]
            loss = functional.cross_entropy(logits, ids[1:], reduction="sum")
            (loss / sum(LENGTHS)).backward()
            total += loss.item()
        return total, {name: p.grad.numpy() for name, p in model.named_parameters()}
    finally:
        parallel_state.destroy_model_parallel()


def mixed_plan(num_ranks):
    """Several microbatches: overlapping groups of every kind, idle ranks, a ring with ranks that get no rows."""
    last = num_ranks - 1
    if num_ranks == 1:
        return verified_plan([[group("local", (0,), range(5))], [group("local", (0,), (5, 6, 7))]], LENGTHS, 1)
    microbatches = [
        [group("ring", tuple(range(num_ranks)), (0, 7)), group("ulysses", (last, 0), (1,)), group("local", (1,), (4,))],
        [group("ulysses", (0, 1), (2, 5))],
        [group("ring", (1, 0), (3,))],
        [group("ring" if num_ranks > 2 else "ulysses", tuple(range(num_ranks)), (6,))],
    ]
    return verified_plan(microbatches, LENGTHS, num_ranks)


def plan_of_every_kind(num_ranks):
    choices = [GroupChoice(kind, tuple(range(num_ranks)), (place,)) for place, kind in enumerate(SHARED_KINDS)]
    rest = GroupChoice(AttentionKind.LOCAL, (0,), tuple(range(len(choices), len(LENGTHS))))
    return make_case([*choices, rest], LENGTHS, num_ranks, num_heads=4).plan


def group(kind, ranks, sequences):
    return AttentionGroup(kind=AttentionKind(kind), ranks=ranks, sequences=tuple(sequences))


def adaptive_plan(num_ranks):
    limits = PlanLimits(
        device_budget_bytes=110, max_ulysses_degree=4, kinds=(AttentionKind.ULYSSES, AttentionKind.RING)
    )
    cost = cost_model(num_ranks)
    return plan_step(step_problem(LENGTHS, num_ranks, cost, limits), step=0, strategy="adaptive")


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(4)
    yield pool
    pool.close()


class TestEqualsDenseModel:
    """fp32, loss from Megatron's own vocabulary-parallel cross entropy: relative error below 1e-5."""

    @pytest.mark.parametrize(
        ("world_size", "tensor_size", "make_plan", "changes"),
        [
            (1, 1, mixed_plan, {}),
            (4, 1, mixed_plan, {}),
            (4, 1, adaptive_plan, {}),
            (4, 1, plan_of_every_kind, {}),
            (4, 2, mixed_plan, {}),
            (4, 1, mixed_plan, {"no_rope_freq": 2}),
        ],
        ids=["1 rank", "4 ranks", "adaptive", "every kind", "tensor 2", "a layer without RoPE"],
    )
    def test_loss_and_gradients(self, pool, world_size, tensor_size, make_plan, changes):
        plan = make_plan(world_size // tensor_size)
        results = pool.run(
            run_documented_code, tensor_size, plan, torch.float32, changes, world_size=world_size, timeout_s=120
        )
        self.compare(pool, results, changes, tensor_size)

    @staticmethod
    def compare(pool, results, changes, tensor_size):
        ((wanted_loss, wanted),) = pool.run(run_oracle, torch.float64, changes, world_size=1)
        loss = sum(total for total, _, tensor_rank in results if tensor_rank == 0)
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        for _, gradients, tensor_rank in results:
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                whole = wanted[name]
                cut = next((d for d in range(whole.ndim) if gradient.shape[d] != whole.shape[d]), None)
                part = whole if cut is None else np.split(whole, tensor_size, axis=cut)[tensor_rank]
                error = np.abs(gradient - part).max() / np.abs(whole).max()
                assert error < 1e-5, f"{name}: {error}"


def one_rank_microbatch(lengths=(6, 4)):
    plan = verified_plan([[group("local", (0,), range(len(lengths)))]], lengths, 1)
    return compile_rank_program(plan, 0).microbatches[0]


def engine():
    return AttentionEngine(CpuFlashKernel(), ThreadFabric(1).wire(0), CPU)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_percent", [1.0, 0.5])
def test_rope_is_megatrons_own(interleaved, rotary_percent):
    rotary = RotaryEmbedding(8, rotary_percent, interleaved, use_cpu_initialization=True)
    config = make_config(dtype=torch.float64, rotary_interleaved=interleaved)
    packed = pack_microbatch(engine(), one_rank_microbatch(), config, inv_freq=rotary.inv_freq)
    x_SNH = torch.randn(10, 3, 8, dtype=torch.float64)
    for start, stop in ((0, 6), (6, 10)):  # Megatron's function rotates one document, from position 0
        angles = torch.outer(torch.arange(stop - start, dtype=torch.float64), rotary.inv_freq.double())
        doubled = torch.stack((angles, angles), -1).flatten(1) if interleaved else torch.cat((angles, angles), -1)
        wanted = _apply_rotary_pos_emb_bshd(x_SNH[start:stop, None], doubled[:, None, None], interleaved)[:, 0]
        torch.testing.assert_close(packed.rope.rotate(x_SNH)[start:stop], wanted, rtol=1e-12, atol=1e-12)


def test_rope_keeps_the_dtype_of_the_heads():
    rope = RotaryTable(torch.ones(2, 1, 2), torch.zeros(2, 1, 2))
    assert rope.rotate(torch.ones(2, 1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def core(config, **changes):
    given = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self", **changes}
    return LonghaulCoreAttention(config, **given)


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({"attention_dropout": 0.1}, {}, "attention_dropout 0.1: set 0"),
        ({"window_size": (127, 0)}, {}, "sliding windows"),
        ({"softmax_type": "off-by-one"}, {}, "softmax_type off-by-one"),
        ({"qk_clip": True}, {}, "qk_clip"),
        ({"mtp_num_layers": 1}, {}, "mtp_num_layers"),
        ({"context_parallel_size": 2}, {}, "context_parallel_size 2"),
        ({"apply_query_key_layer_scaling": True}, {}, "apply_query_key_layer_scaling"),
        ({}, {"softmax_scale": 0.5}, "softmax_scale 0.5"),
        ({}, {"attn_mask_type": AttnMaskType.padding}, "only causal"),
        ({}, {"attention_type": "cross"}, "attention_type cross"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(changes, arguments, named):
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(SpecError, match=named):
        core(config, **arguments)


def test_a_forward_that_does_not_fit_the_microbatch_is_refused():
    config = make_config()
    packed = pack_microbatch(engine(), one_rank_microbatch(), config, inv_freq=None)
    q, kv = torch.randn(10, 1, 4, 8), torch.randn(10, 1, 2, 8)
    layer = core(config)
    assert layer(q, kv, kv, None, packed_seq_params=packed).shape == (10, 1, 32)
    with pytest.raises(SpecError, match="attention_mask=None"):
        layer(q, kv, kv, torch.zeros(1), packed_seq_params=packed)
    with pytest.raises(SpecError, match="pack_microbatch"):
        layer(q, kv, kv, None)
    with pytest.raises(SpecError, match="given 1 x 9 tokens"):
        layer(q[:9], kv[:9], kv[:9], None, packed_seq_params=packed)
    with pytest.raises(SpecError, match="given 2 x 5 tokens"):
        layer(q.view(5, 2, 4, 8), kv.view(5, 2, 2, 8), kv.view(5, 2, 2, 8), None, packed_seq_params=packed)


def run_megatrons_own_rope(rank, world_size, init_method, kind):
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    parallel_state.initialize_model_parallel()
    try:
        config = make_config()
        spec = with_longhaul_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
        model = GPTModel(config, spec, VOCAB_SIZE, MAX_LENGTH, position_embedding_type=kind)
        packed = pack_microbatch(engine(), one_rank_microbatch(), config, inv_freq=None)
        with pytest.raises(SpecError, match='position_embedding_type="none"'):
            model(torch.zeros(1, 10, dtype=torch.int64), packed.position_ids, None, packed_seq_params=packed)
    finally:
        parallel_state.destroy_model_parallel()


def test_megatrons_own_rope_is_refused(pool):
    pool.run(run_megatrons_own_rope, "rope", world_size=1)


def checkpoint_names(rank, world_size, init_method):
    """Names and shapes in Megatron's sharded state dict: of the stock model and of the model with our attention."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    parallel_state.initialize_model_parallel()
    try:
        stock = get_gpt_layer_local_spec(normalization="RMSNorm")
        found = []
        for spec in (stock, with_longhaul_attention(stock)):
            model = GPTModel(make_config(), spec, VOCAB_SIZE, MAX_LENGTH, position_embedding_type="none")
            state = model.sharded_state_dict()
            found.append({name: tuple(getattr(entry, "global_shape", ())) for name, entry in state.items()})
        return found
    finally:
        parallel_state.destroy_model_parallel()


def test_checkpoints_stay_megatrons_own(pool):
    ((stock, ours),) = pool.run(checkpoint_names, world_size=1)
    assert stock and ours == stock


def test_the_layer_spec_given_is_left_as_it_was():
    given = get_gpt_layer_local_spec()
    before = given.submodules.self_attention.submodules.core_attention
    changed = with_longhaul_attention(given)
    assert given.submodules.self_attention.submodules.core_attention is before
    assert changed.submodules.self_attention.submodules.core_attention.module is LonghaulCoreAttention
    with pytest.raises(SpecError, match="no self_attention"):
        with_longhaul_attention(ModuleSpec(module=torch.nn.Identity))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="5 frequencies; a head of 8 takes 1 to 4"):
        pack_microbatch(engine(), one_rank_microbatch(), make_config(), inv_freq=torch.ones(5))
    packed = pack_microbatch(engine(), one_rank_microbatch(), make_config(), inv_freq=None)
    with pytest.raises(SpecError, match=r"shape \(1, 9\) for a microbatch of shape \(1, 10\)"):
        packed.pad(torch.zeros(1, 10), torch.zeros(1, 9))


def test_sequence_parallelism_gets_rows_that_divide():
    config = dataclasses.replace(make_config(tensor_size=2), sequence_parallel=True)
    packed = pack_microbatch(engine(), one_rank_microbatch((4, 3)), config, inv_freq=None)
    (tokens,) = packed.pad(torch.arange(1, 8)[None])
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert packed.sum_losses(tokens + 1).item() == 35
