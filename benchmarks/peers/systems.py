"""Public sequence-parallel systems in Longhaul's own model, for ``benchmarks.step --peers``.

Only the exchange around attention and the packing are a peer's. Model, kernel, weights, sharding, optimizer, batches
and memory are the same for all. Peers are installed for the benchmark only, into an environment that has Longhaul:

    pip install deepspeed==0.19.8                       (DistributedAttention: Ulysses)
    pip install --no-deps verl==0.9.1                   (gather_seq_scatter_heads and back: Ulysses)
    pip install --no-deps ring-flash-attn==0.1.8        (zigzag ring over packed documents)

An environment of their own, over the one that ``make`` builds:

    python -m venv /tmp/peers
    readlink -f .venv/lib/python3.*/site-packages > $(echo /tmp/peers/lib/python3.*/site-packages)/longhaul.pth
    /tmp/peers/bin/pip install ...                      (the three lines above)
    PYTHONPATH=. /tmp/peers/bin/python -m benchmarks.step ... --peers deepspeed,verl,ring-flash-attn

(verl's wheel also has a top-level package ``tests``, which hides Longhaul's own from pytest: delete that folder.) Of
verl and ring-flash-attn only one module is loaded, without the package around it, because the package's requirements
(Ray, transformers 4, flash-attn) are large and not needed here. For ring-flash-attn, Longhaul's kernel replaces
flash-attn, in the benchmark's processes only.

Known limits, which the report repeats: with both Ulysses peers, KV heads that are fewer than ranks are repeated before
the exchange (verl does so itself, DeepSpeed asserts). ring-flash-attn 0.1.8 computes wrong gradients in fp32 (its
accumulator is the buffer that the next block overwrites), though with the work of right ones, so its losses are
compared and its gradients are not.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A public system. ``package``: what is imported. ``kind``: how it cuts rows. ``wrong_gradients``: the dtypes (as
    ``str(torch.dtype)``) in which its gradients are known to be wrong."""

    package: str
    install: str
    what: str
    kind: AttentionKind
    wrong_gradients: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Why it cannot run here, in one line with the remedy, or None."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed; in the benchmark's environment: {self.install}"

    def can_split(self, spec: ModelSpec, degree: int) -> bool:
        """Whether ``degree`` ranks can share this model's attention. Rings always can. Ulysses needs whole query heads
        on every rank, and KV heads that can be divided or repeated evenly."""
        if self.kind is AttentionKind.RING:
            return True
        queries, keys = spec.num_query_heads, spec.num_kv_heads
        return queries % degree == 0 and (keys % degree == 0 or degree % keys == 0)


PEERS = {
    "deepspeed": Peer(
        package="deepspeed", install="pip install deepspeed==0.19.8", kind=AttentionKind.ULYSSES,
        what="DeepSpeed's DistributedAttention",
    ),
    "verl": Peer(
        package="verl", install="pip install --no-deps verl==0.9.1", kind=AttentionKind.ULYSSES,
        what="verl's Ulysses exchange",
    ),
    "ring-flash-attn": Peer(
        package="ring_flash_attn", install="pip install --no-deps ring-flash-attn==0.1.8", kind=AttentionKind.RING,
        what="ring-flash-attn's zigzag ring over packed documents", wrong_gradients=("torch.float32",),
    ),
}
