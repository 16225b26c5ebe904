"""Which strategies choose memory policies, why a plan kept everything, and what would help if it does not fit."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import MemoryAction

POLICY_STRATEGIES = {
    "adaptive": (MemoryAction.SWAP, MemoryAction.RECOMPUTE, MemoryAction.CHUNK),
    "hdp": (MemoryAction.SWAP,),
    "hdp-floor": (MemoryAction.SWAP,),
}
"""What these strategies may choose besides keep; other strategies keep everything."""


def choosers() -> str:
    """The strategies that choose policies: ``adaptive: swap, recompute or chunk; hdp, hdp-floor: swap``."""
    by_actions: dict[tuple[MemoryAction, ...], list[str]] = {}
    for name, actions in POLICY_STRATEGIES.items():
        by_actions.setdefault(actions, []).append(name)
    return "; ".join(f"{', '.join(names)}: {_either(actions)}" for actions, names in by_actions.items())


def chooses_none(strategy: str) -> str:
    """For example ``flexsp chooses no memory policies (adaptive: ...)``."""
    return f"{strategy} chooses no memory policies ({choosers()})"


def why_kept(strategy: str, cost: CostModel, limits: PlanLimits) -> str:
    """Why plans of this strategy keep all activations, as the end of a sentence."""
    asked = [action for action in limits.policies if action is not MemoryAction.KEEP]
    if not asked:
        return ", as --memory keep says"
    if not cost.prices_policies:
        return ", since the cost model prices nothing else"
    able = POLICY_STRATEGIES.get(strategy)
    if able is None:
        return f": {chooses_none(strategy)}"
    usable = [action for action in able if action in asked]
    if not usable:
        return f": {strategy} chooses {_either(able)} only, not {_either(asked)} ({choosers()})"
    usable = [action for action in usable if _is_priced(action, cost)]
    if not usable:
        return ", since the cost model prices none of the requested policies"
    return f", since {strategy} would gain nothing by {_either(usable)}"


def what_helps(strategies: SequenceOf[str], cost: CostModel, limits: PlanLimits) -> str:
    """What to try if a sequence fits no group under any of these strategies, besides changing sizes, as the end of a
    sentence; empty if there is nothing."""
    if not cost.prices_policies or limits.device_budget_bytes <= cost.memory.fixed_bytes:
        return ""
    able = {action for strategy in strategies for action in POLICY_STRATEGIES.get(strategy, ())}
    asked = {action for action in limits.policies if action is not MemoryAction.KEEP}
    if able & asked:
        return ""  # already tried
    flags = [*([] if able else ["--strategy adaptive"]), *([] if asked and not able else ["--memory auto"])]
    return f"; or try {' '.join(flags)}" + ("" if able or not asked else f": {chooses_none(strategies[0])}")


def _is_priced(action: MemoryAction, cost: CostModel) -> bool:
    return cost.chunks is not None if action is MemoryAction.CHUNK else cost.activation is not None


def _either(actions: SequenceOf[MemoryAction]) -> str:
    """For example ``swap, recompute or chunk``."""
    *first, last = map(str, actions)
    return f"{', '.join(first)} or {last}" if first else last
