"""Memory policies in words: a short name for tables, and a line for the result."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.pages.planned_step import PlannedStep
from planner.pages.policy_reasons import why_kept
from planner.plan import AttentionGroup, MemoryAction, MemoryPolicy, Microbatch
from planner.pricing.simulate import step_lengths
from planner.schedules.layout import local_token_counts
from planner.units import format_count


def policy_name(policy: MemoryPolicy) -> str:
    """For example ``keep``, ``swap 50%``, ``swap 25%, recompute 50%`` or ``chunks of 4,096`` (tokens per rank)."""
    if policy.chunk_tokens:
        return f"chunks of {policy.chunk_tokens:,}"
    parts = [("swap", policy.swap_fraction), ("recompute", policy.recompute_fraction)]
    return ", ".join(f"{name} {_share(fraction)}" for name, fraction in parts if fraction > 0) or "keep"


def _share(fraction: float) -> str:
    """For example ``50%``; small fractions are never shown as zero."""
    return f"{fraction:.0%}" if fraction >= 0.005 else "<1%"


def policy_line(steps: SequenceOf[PlannedStep], cost: CostModel, limits: PlanLimits) -> str:
    """One line: the policies of these steps' microbatches, and what they made possible."""
    found = [(microbatch, step_lengths(step.plan)) for step in steps for microbatch in step.plan.microbatches]
    changed = [(microbatch, lengths) for microbatch, lengths in found if not microbatch.memory.is_keep]
    if not changed:
        return f"memory policy: all activations kept{why_kept(steps[0].plan.strategy, cost, limits)}"
    actions = []
    for action in (MemoryAction.SWAP, MemoryAction.RECOMPUTE):
        fractions = [getattr(microbatch.memory, f"{action}_fraction") for microbatch, _ in changed]
        used = [fraction for fraction in fractions if fraction > 0]
        if used:
            least, most = _share(min(used)), _share(max(used))
            span = most if least == most else f"{least} to {most}"
            actions.append(f"{len(used)} {action} {span} of their tokens' activations")
    sizes = [microbatch.memory.chunk_tokens for microbatch, _ in changed if microbatch.memory.chunk_tokens]
    if sizes:
        span = f"{max(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        actions.append(f"{len(sizes)} run in chunks of {span} tokens per rank")
    held = cost.max_local_tokens(limits.device_budget_bytes)
    spared = [_ranks_spared(microbatch, lengths, held, cost) for microbatch, lengths in changed]
    impossible = [words for num_ranks, words in spared if num_ranks is None]
    shrunk = [(num_ranks, words) for num_ranks, words in spared if num_ranks]
    num_larger = len(spared) - len(impossible) - len(shrunk)
    why = [f"{len(impossible)} since no number of ranks could keep all ({impossible[0]})"] if impossible else []
    if shrunk:
        why.append(f"{len(shrunk)} to need fewer ranks ({max(shrunk)[1]})")
    if num_larger:
        why.append(f"{num_larger} to hold more in one microbatch")
    return (
        f"memory policy: {len(changed)} of {len(found)} microbatches do not keep all, {' and '.join(actions)}: "
        f"{', '.join(why)}"
    )


def _ranks_spared(
    microbatch: Microbatch, lengths: SequenceOf[int], rank_tokens: int, cost: CostModel
) -> tuple[int | None, str]:
    """How many more ranks the microbatch's longest sequence would need with everything kept (None: no number would be
    enough), and a text that says it."""
    group: AttentionGroup = max(microbatch.groups, key=lambda group: max(lengths[i] for i in group.sequences))
    longest = max(lengths[index] for index in group.sequences)
    # Instead of a single rank, a group of any kind could be used; take the one that needs the fewest ranks.
    fits = sorted(
        (fit.degree, fit.kind, fit.inner_degree) for fit in cost.times if group.degree == 1 or fit.kind is group.kind
    )
    for degree, kind, inner_degree in fits:
        if max(local_token_counts(kind, degree, [longest], inner_degree)) <= rank_tokens:
            words = f"{group.degree} instead of {degree} for {format_count(longest)} tokens"
            return max(0, degree - group.degree), words
    return None, f"{format_count(longest)} tokens on {group.degree}"
