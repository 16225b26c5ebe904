"""A step's plan and outcome as one flat record of predicted and measured values."""

from __future__ import annotations

from memory.activations import ActivationMemory
from planner.cost.model import CostModel
from planner.inputs.model import ModelSpec
from planner.plan import StepPlan
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import simulate, step_lengths
from planner.schedules.layout import local_token_counts
from trainer.record.metrics import StepReport
from trainer.step.shared import StepOutcome


def make_report(
    plan: StepPlan, outcome: StepOutcome, *, lr: float, spec: ModelSpec, plan_wait_s: float, flop_per_s: float,
    drift_ratio: float | None, gradients: str = "exact", predicted_host_bytes: int = 0,
) -> StepReport:
    """``flop_per_s``: peak of all devices of the job together; 0 if it is not known (then there is no MFU)."""
    lengths = [sequence.num_tokens for sequence in plan.sequences]
    model_flop = spec.model_flop(lengths)
    mean_busy_s = sum(outcome.busy_s) / len(outcome.busy_s)
    span_s = max(outcome.span_s)
    return StepReport(
        step=plan.step,
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        lr=lr,
        num_tokens=plan.num_tokens,
        num_sequences=len(lengths),
        max_sequence_tokens=max(lengths),
        strategy=plan.strategy,
        plan_status=plan.solver.status.value,
        predicted_s=plan.predicted_s,
        measured_s=outcome.measured_s,
        bound_s=plan.solver.bound_s,
        gap=plan.solver.gap,
        plan_s=plan.solver.wall_s,
        plan_wait_s=plan_wait_s,
        idle_fraction=max(0.0, 1 - mean_busy_s / span_s) if span_s > 0 else 0.0,
        imbalance=max(outcome.busy_s) / mean_busy_s - 1 if mean_busy_s > 0 else 0.0,
        peak_bytes=max(outcome.peak_bytes),
        predicted_peak_bytes=plan.peak_bytes,
        host_peak_bytes=max(outcome.tier_peak_bytes),
        predicted_host_bytes=predicted_host_bytes,
        tokens_per_s=plan.num_tokens / (outcome.measured_s + plan_wait_s),
        model_flops=model_flop,
        mfu=model_flop / (outcome.measured_s * flop_per_s) if flop_per_s > 0 else None,
        padding_tokens=num_executed_tokens(plan) - plan.num_tokens,
        num_microbatches=len(plan.microbatches),
        group_summary=group_summary(plan),
        gather_s=min(outcome.gather_s),
        compute_s=mean_busy_s,
        exchange_wait_s=sum(outcome.span_s) / len(outcome.span_s) - mean_busy_s,
        reduce_s=min(outcome.reduce_s),
        update_s=outcome.update_s,
        drift_ratio=drift_ratio,
        gradients=gradients,
    )


def predicted_host_bytes(plan: StepPlan, cost: CostModel, memory: ActivationMemory) -> int:
    """Most bytes that one device of this plan has in its tier, by the plan's policies, or by the run's if the plan
    keeps everything. With stages, every microbatch in flight counts as the largest one."""
    if any(each.memory.swap_fraction > 0 for each in plan.microbatches):
        return max(simulate(plan, cost).rank_host_bytes)
    if not memory.tier_bytes_per_token:
        return 0  # saves pricing microbatches in every step of a run without a tier
    lengths = step_lengths(plan)
    fullest = max((max(price_microbatch(each, lengths, cost).rank_tokens) for each in plan.microbatches), default=0)
    return int(memory.tier_bytes_per_token * fullest) * plan.num_stages


def num_executed_tokens(plan: StepPlan) -> int:
    """Rows that the ranks actually run, over all microbatches."""
    lengths = [sequence.num_tokens for sequence in plan.sequences]
    groups = [group for microbatch in plan.microbatches for group in microbatch.groups]
    return sum(
        sum(local_token_counts(group.kind, group.degree, [lengths[index] for index in group.sequences]))
        for group in groups
    )


def group_summary(plan: StepPlan) -> str:
    """Degrees of the attention groups in execution order: ``2+1`` within a microbatch, ``|`` between microbatches."""
    return " | ".join("+".join(str(group.degree) for group in microbatch.groups) for microbatch in plan.microbatches)
