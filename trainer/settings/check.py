"""Finds everything that is wrong with a run's settings before any process starts, and reports it all at once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planner.codec import suggest
from planner.errors import SpecError
from planner.schedules.exchange import attention_names
from planner.units import parse_bytes
from trainer.settings.tree import TrainConfig, model_spec

BUILT_POLICIES = ("auto", "keep", "recompute", "swap", "seco", "spaco")
CHUNKED_POLICIES = ("seco", "spaco")
KEPT_LAYERS = {"swap": 2, "recompute": 1}
"""Last layers that keep their activations under each policy: as in ``memory.policy``, which would import torch."""
TIERS = ("host", "disk")

_Range = tuple[str, Callable[[Any], bool], str]


def check_config(config: TrainConfig) -> tuple[str, ...]:
    """One line per problem; empty if the run may start. Reads the file system but uses no device."""
    found: list[str] = []
    checks = (
        _out_of_range, _not_built_yet, _wrong_memory, _wrong_chunks, _wrong_paths, _wrong_texts, _wrong_sizes,
        _wrong_model,
    )
    for check in checks:
        found.extend(check(config))
    return tuple(found)


def _at_least(lowest: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= lowest, f"at least {lowest}"


def _ranges() -> tuple[_Range, ...]:
    positive = (lambda value: 0 < value < math.inf, "a finite number above 0")
    not_negative = (lambda value: 0 <= value < math.inf, "a finite number, 0 or more")
    below_one = (lambda value: 0 <= value < 1, "in [0, 1)")
    fraction = (lambda value: 0 <= value <= 1, "in [0, 1]")
    return (
        ("run.steps", *_at_least(1)),
        ("run.seed", lambda value: 0 <= value < 2**63, "in [0, 2**63)"),
        ("run.checkpoint_every", *_at_least(0)),
        ("run.keep_checkpoints", *_at_least(1)),
        ("run.world_size", *_at_least(1)),
        ("run.collective_timeout_s", *positive),
        ("model.rope_theta", *positive),
        ("model.lora_rank", *_at_least(1)),
        ("data.max_length", *_at_least(1)),
        ("data.tokens_per_step", *_at_least(1)),
        ("parallel.tensor_parallel", *_at_least(1)),
        ("parallel.pipeline_parallel", *_at_least(1)),
        ("parallel.shard_ranks", *_at_least(1)),
        ("plan.degree", *_at_least(1)),
        ("plan.ahead", *_at_least(1)),
        ("plan.wait_budget_s", *not_negative),
        ("plan.time_limit_s", *positive),
        ("plan.relative_gap", *below_one),
        ("plan.max_nodes", *_at_least(1)),
        ("optimizer.lr", *positive),
        ("optimizer.min_lr_ratio", *fraction),
        ("optimizer.warmup_steps", *_at_least(0)),
        ("optimizer.weight_decay", *not_negative),
        ("optimizer.beta1", *below_one),
        ("optimizer.beta2", *below_one),
        ("optimizer.eps", *positive),
        ("optimizer.clip_norm", lambda value: value > 0, "above 0 (inf never clips)"),
        ("memory.swap_fraction", *fraction),
        ("memory.chunk_tokens", *_at_least(1)),
        ("memory.mlp_chunk_tokens", lambda value: value >= 0, "at least 1, or 0 for all tokens at once"),
        ("memory.sample_fraction", lambda value: 0 < value <= 1, "in (0, 1]"),
        ("metrics.spans_every", *_at_least(0)),
        ("metrics.drift_factor", lambda value: value > 1, "above 1 (inf never warns)"),
    )


def _out_of_range(config: TrainConfig) -> Iterator[str]:
    for name, allowed, text in _ranges():
        value = operator.attrgetter(name)(config)
        if value is not None and not allowed(value):
            yield f"{name} must be {text}, got {value}"


def _not_built_yet(config: TrainConfig) -> Iterator[str]:
    if config.plan.strategy != type(config.plan)().strategy:  # loading every planner takes longer than all other checks
        from planner.step_planner import STRATEGIES

        yield from _choice("plan.strategy", config.plan.strategy, tuple(STRATEGIES), ())
    yield from _choice("plan.attention", config.plan.attention, attention_names(), ())
    yield from _choice("memory.policy", config.memory.policy, BUILT_POLICIES, ())
    later = {
        "model.init_from": "random initial weights",
        "model.lora_rank": "training all weights",
    }
    for name, available in later.items():
        if operator.attrgetter(name)(config) is not None:
            yield f"{name} is not built yet; available: {available} (leave it out)"


def _choice(name: str, value: str, built: tuple[str, ...], later: tuple[str, ...]) -> Iterator[str]:
    if value in later:
        yield f"{name} {value} is not built yet; available: {', '.join(built)}"
    elif value not in built:
        yield f"{name} {value!r} is unknown{suggest(value, (*built, *later))}"


def _wrong_memory(config: TrainConfig) -> Iterator[str]:
    memory = config.memory
    if memory.tier is not None:
        yield from _choice("memory.tier", memory.tier, TIERS, ())
    if memory.policy != "swap" and memory.swap_fraction is not None:
        yield (
            f"memory.swap_fraction is for memory.policy swap only, not {memory.policy}: add --memory swap or leave it "
            "out"
        )
    if memory.policy not in ("swap", "auto", *CHUNKED_POLICIES) and memory.tier is not None:
        yield f"memory.tier is for memory.policy swap, seco, spaco and auto only, not {memory.policy}: leave it out"
    elif memory.policy == "auto" and (memory.tier is not None or memory.tier_budget != "auto"):
        yield from _tier_for_no_plan(config)
    has_tier = memory.policy in ("swap", "auto") or (memory.policy in CHUNKED_POLICIES and memory.tier is not None)
    if memory.tier_budget != "auto" and not has_tier:
        yield (
            f"memory.tier_budget is for runs that use a tier, not memory.policy {memory.policy} without one: leave it "
            "out"
        )
    if memory.static_plan and config.run.device == "cpu":
        yield "memory.static_plan is for run.device cuda: the CPU's allocator cannot be replaced; leave it out"
    if memory.static_plan and config.parallel.pipeline_parallel > 1:
        yield (
            "memory.static_plan is not built yet for pipeline_parallel above 1, where microbatches overlap; available: "
            "one stage"
        )


def _tier_for_no_plan(config: TrainConfig) -> Iterator[str]:
    from planner.pages.policy_reasons import POLICY_STRATEGIES, chooses_none  # loads the cost model, seldom needed here

    name = "memory.tier" if config.memory.tier is not None else "memory.tier_budget"
    if config.plan.strategy not in POLICY_STRATEGIES:
        yield (
            f"{name}: nothing would be swapped, because {chooses_none(config.plan.strategy)}: leave it out, or add "
            "--memory swap"
        )


def _wrong_paths(config: TrainConfig) -> Iterator[str]:
    path = config.data.path
    if path is not None and not set(path) & set("*?[") and not (path and _holds(path, Path.exists)):
        yield f"data.path {path!r}: no such file or folder"  # glob patterns are resolved with the corpus
    files = {"data.tokenizer": config.data.tokenizer, "plan.cost": config.plan.cost}
    for name, file in files.items():
        if file is not None and (name, file) != ("plan.cost", "auto") and not _holds(file, Path.is_file):
            yield f"{name} {file!r}: no such file"
    folders = {"run.dir": config.run.dir, "data.cache_dir": config.data.cache_dir}
    for name, folder in folders.items():
        if folder is not None and (not folder or (_holds(folder, Path.exists) and not _holds(folder, Path.is_dir))):
            yield f"{name} {folder!r} is not a folder"


def _holds(path: str, test: Callable[[Path], bool]) -> bool:
    """``test(path)``; False for names that the file system refuses (too long, or in an unreadable folder)."""
    try:
        return test(Path(path))
    except (OSError, ValueError):
        return False


def _wrong_texts(config: TrainConfig) -> Iterator[str]:
    if not config.data.text_field:
        yield "data.text_field must not be empty"
    budgets = {"plan.device_budget": config.plan.device_budget, "memory.tier_budget": config.memory.tier_budget}
    for name, text in budgets.items():
        if text == "auto":
            continue
        try:
            if parse_bytes(text, what=name) < 1:
                yield f"{name} must be above 0 bytes, got {text!r}"
        except SpecError as error:
            yield str(error)


def _wrong_sizes(config: TrainConfig) -> Iterator[str]:
    data, plan = config.data, config.plan
    if 1 <= data.tokens_per_step < data.max_length:
        yield (
            f"data.tokens_per_step ({data.tokens_per_step}) must be at least data.max_length ({data.max_length}): "
            "a step must hold the longest sample"
        )
    world_size, parallel = config.run.world_size, config.parallel
    if min(world_size, parallel.tensor_parallel, parallel.pipeline_parallel) < 1:
        return
    share = parallel.tensor_parallel * parallel.pipeline_parallel
    names = f"parallel.tensor_parallel ({parallel.tensor_parallel})"
    if parallel.pipeline_parallel > 1:
        names += f" x parallel.pipeline_parallel ({parallel.pipeline_parallel})"
    if world_size % share:
        yield f"{names} must divide run.world_size ({world_size})"
        return
    most = parallel.data_ranks(world_size)
    if parallel.shard_ranks is not None and parallel.shard_ranks >= 1 and most % parallel.shard_ranks:
        yield f"parallel.shard_ranks ({parallel.shard_ranks}) must divide the {most} data ranks"
    if plan.degree is None:
        return
    if plan.strategy != "static":
        yield f"plan.degree is for plan.strategy static only, not {plan.strategy}: that planner chooses degrees itself"
    if plan.degree > most:
        yield f"plan.degree ({plan.degree}) must be at most {most}: world_size {world_size} / {names}"


def _wrong_model(config: TrainConfig) -> Iterator[str]:
    try:
        spec = model_spec(config, vocab_size=1)
    except SpecError as error:
        yield str(error)
        return
    if spec.num_experts > 1 or spec.learned_positions or not spec.gated_mlp:
        yield (
            f"model.preset ({spec.name}) can be planned but not trained: training builds dense gated decoders with RoPE"
        )
    num_stages = config.parallel.pipeline_parallel
    kept = KEPT_LAYERS.get(config.memory.policy, 0)
    if num_stages == 1 and 1 <= spec.num_layers <= kept:
        yield (
            f"memory.policy {config.memory.policy} needs at least {kept + 1} layers, because the last "
            f"{'one is' if kept == 1 else f'{kept} are'} always kept; {spec.name} has {spec.num_layers}"
        )
    if config.parallel.gradient_dtype == "bf16" and config.run.dtype != "bf16":
        yield f"parallel.gradient_dtype bf16 needs run.dtype bf16: with {config.run.dtype} all gradients are fp32"
    if num_stages > 1 and config.parallel.sharding == "zero3":
        yield "parallel.sharding zero3 cannot be used with pipeline_parallel above 1: use gather_once"
    if num_stages > spec.num_layers:
        yield f"parallel.pipeline_parallel ({num_stages}) is more than the {spec.num_layers} layers of {spec.name}"
    if num_stages > 1 and spec.tied_head:
        yield (
            f"parallel.pipeline_parallel ({num_stages}): model {spec.name} ties its head to the embedding, and they "
            "would be on different stages; use --model.tied-head false"
        )
    shares = config.parallel.tensor_parallel
    if shares < 1:
        return
    sizes = {name: getattr(spec, name) for name in ("num_query_heads", "num_kv_heads", "ffn_dim")}
    uneven = " and ".join(f"{name} ({size})" for name, size in sizes.items() if size % shares)
    if uneven:
        yield f"parallel.tensor_parallel ({shares}) must divide {uneven} of model {spec.name}"
    heads, degree = spec.num_query_heads // shares, config.plan.degree
    if config.plan.attention == "ulysses" and degree is not None and degree > heads:
        yield (
            f"plan.degree ({degree}) is more than the {heads} query heads of a tensor rank: ulysses splits heads; "
            "use a smaller degree or --attention ring"
        )


def _wrong_chunks(config: TrainConfig) -> Iterator[str]:
    """Settings of chunked training: complete where it is asked for, absent where it is not."""
    memory, policy = config.memory, config.memory.policy
    chunked, sampled = policy in CHUNKED_POLICIES, policy == "spaco"
    if chunked and memory.chunk_tokens is None:
        yield f"memory.policy {policy} needs memory.chunk_tokens (--chunk-tokens N): tokens per rank in one chunk"
    if sampled and memory.sample_fraction is None:
        yield "memory.policy spaco needs memory.sample_fraction (--sample-fraction F): share of chunks to run backward"
    if memory.chunk_tokens is not None and not chunked:
        yield f"memory.chunk_tokens is for memory.policy seco and spaco, not {policy}"
    if memory.sample_fraction is not None and not sampled:
        yield f"memory.sample_fraction is for memory.policy spaco, not {policy}"
    if memory.sampling != type(memory)().sampling and not sampled:
        yield f"memory.sampling is for memory.policy spaco, not {policy}"
    try:
        if parse_bytes(memory.chunk_budget, what="memory.chunk_budget") and not chunked:
            yield f"memory.chunk_budget is for memory.policy seco and spaco, not {policy}"
    except SpecError as error:
        yield str(error)
    in_step = config.parallel.pipeline_parallel > 1 or config.parallel.sharding == "zero3"
    if chunked and in_step and memory.chunk_budget != type(memory)().chunk_budget:
        yield "memory.chunk_budget is for one pipeline stage and sharding gather_once only: leave it out"
    if chunked and memory.tier is not None and config.parallel.pipeline_parallel > 1:
        yield (
            f"memory.tier with memory.policy {policy} is not built yet for pipeline_parallel above 1, where "
            "K/V of several microbatches are live at once; available: one stage, or leave memory.tier out"
        )
