"""Inputs of a run's planner: limits from the settings, a cost model from a file. Does not import torch, so that
mistakes are found before any process starts."""

from __future__ import annotations

import math
from dataclasses import replace

from planner.cost.limits import PlanLimits
from planner.cost.machine_profile import load_cost
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, SpecError
from planner.inputs.model import ModelSpec
from planner.pages.policy_reasons import POLICY_STRATEGIES, chooses_none
from planner.plan import AttentionKind, MemoryAction, Sharding, StepPlan
from planner.pricing.problem import StepProblem
from planner.schedules.exchange import attention_kinds
from planner.step_planner import plan_step
from trainer.data.training_data import TrainingData
from trainer.settings.check import CHUNKED_POLICIES
from trainer.settings.tree import TrainConfig


def plan_limits(
    config: TrainConfig, spec: ModelSpec, *, device_budget_bytes: int, devices_per_node: int | None = None
) -> PlanLimits:
    """What plans of this run may use of each device and of the solver. ``devices_per_node``: number of data ranks per
    node (None: there is only one node)."""
    return PlanLimits(
        device_budget_bytes=device_budget_bytes,
        max_ulysses_degree=spec.num_query_heads // config.parallel.tensor_parallel,
        kinds=attention_kinds(config.plan.attention),
        max_nodes=config.plan.max_nodes,
        time_limit_s=config.plan.time_limit_s,
        relative_gap=config.plan.relative_gap,
        devices_per_node=devices_per_node,
    )


def plans_policies(config: TrainConfig) -> bool:
    """Whether this run's plans may choose memory policies (if memory is scarce and the cost model prices them)."""
    return config.memory.policy == "auto" and config.plan.strategy in POLICY_STRATEGIES


def plans_chunks(config: TrainConfig) -> bool:
    """Whether this run's plans may also run microbatches in chunks."""
    return plans_policies(config) and config.plan.strategy == "adaptive"


def measures_policies(cost: CostModel) -> bool:
    """Whether this run may measure prices of swap, recompute and chunks and add them to a cost model without them: only
    if the rest of the cost model was measured too."""
    return cost.activation is None and cost.provenance.source == "measured"


def with_policies(limits: PlanLimits, *, host_budget_bytes: int) -> PlanLimits:
    """These limits with every memory policy allowed."""
    return replace(limits, policies=tuple(MemoryAction), host_budget_bytes=host_budget_bytes)


def load_run_cost(config: TrainConfig) -> CostModel:
    """The cost model in the file ``plan.cost``. Raises SpecError naming the file and what is wrong or does not fit."""
    cost = load_cost(config.plan.cost)
    parallel = config.parallel
    _check_cost(cost, f"--plan.cost {config.plan.cost}", Sharding(parallel.sharding), parallel.pipeline_parallel)
    return cost


def _check_cost(cost: CostModel, where: str, sharding: Sharding, num_stages: int) -> None:
    numbers = {
        "memory.fixed_bytes": cost.memory.fixed_bytes, "memory.bytes_per_token": cost.memory.bytes_per_token,
        "step_fixed_s": cost.step_fixed_s, "peak_flop_per_s": cost.peak_flop_per_s,
    }
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise SpecError(f"{where}: {name} must be 0 or more and finite, got {value}")
    if not cost.degrees(AttentionKind.LOCAL):
        raise SpecError(f"{where}: times holds no local group of degree 1, which every planner starts from")
    if cost.sharding is not sharding:
        raise SpecError(
            f"{where}: priced for sharding {cost.sharding}, this run has {sharding}: set --parallel.sharding to match"
        )
    if cost.num_stages != num_stages:
        raise SpecError(
            f"{where}: priced for {cost.num_stages} pipeline stages, this run has {num_stages}: set "
            "--pipeline-parallel to match, or calibrate with it"
        )


def require_longest_fits(
    config: TrainConfig, data: TrainingData, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> StepPlan:
    """The plan of the corpus's longest sequence alone. Raises InfeasibleError, with what would help, if no group of the
    ``num_ranks`` data ranks can hold it; SpecError if the cost model does not price what the settings ask for."""
    longest = int(data.samples.num_tokens.max())
    problem = StepProblem(lengths=(longest,), num_ranks=num_ranks, cost=cost, limits=limits)
    try:
        return plan_step(problem, step=0, strategy=config.plan.strategy, degree=config.plan.degree)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{error}{_what_helps(config, cost)}", binding=error.binding, needed_bytes=error.needed_bytes,
            available_bytes=error.available_bytes,
        ) from error


def _what_helps(config: TrainConfig, cost: CostModel) -> str:
    """Memory policies that would help and that this run does not use, as the end of a sentence. A cost model from a
    file is valid only for the policy it was made with; with such a file only policies chosen by plans can help."""
    policy, strategy = config.memory.policy, config.plan.strategy
    chooses = strategy in POLICY_STRATEGIES
    can_choose = cost.activation is not None or measures_policies(cost)
    tries, why = [], ""
    if can_choose and not (policy == "auto" and chooses):
        flags = [*([] if chooses else ["--strategy adaptive"]), *([] if policy == "auto" else ["--memory auto"])]
        tries.append(" ".join(flags))
        why = "" if chooses else f" ({chooses_none(strategy)})"
    if config.plan.cost == "auto":
        if policy in CHUNKED_POLICIES:
            return ", or use a smaller --chunk-tokens"
        if policy != "recompute" and not (policy == "auto" and chooses and can_choose):
            tries.append("--memory recompute")
        tries.append("--memory seco --chunk-tokens N")
    return f", or use {' or '.join(tries)}{why}" if tries else ""

