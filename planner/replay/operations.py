"""Seconds of single operations on a cluster, which ``planner.replay.step`` combines into a step.

Attention and collectives follow curves that are fitted, when loaded, to the measured rows of
``planner/replay/curves/h100.yaml``. Other devices use the same curves, scaled by the cluster file, which is a guess;
``scale_note`` says so. Token-wise compute is a roofline with the cluster file's numbers: matrix products run at
``linear_efficiency`` of the peak unless there are so few tokens that reading the weights takes longer; norms, RoPE,
gate and residuals move their bytes.

Every kind of operation has a spread of factors on its nominal seconds, ``fast`` to ``slow``: that of the measured rows
around the fit, or what the file states. ``MachineModel.at`` gives the machine at one end of the spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.inputs.cluster import ClusterSpec, LinkSpec

FloatArray = npt.NDArray[np.float64]

TILE_TOKENS = 128
"""Matrix products work on whole tiles of so many rows."""

_FIT_LOW, _FIT_HIGH = 0.1, 0.9
"""Quantiles of measured over fitted seconds at the ends of the spread."""


class End(StrEnum):
    """A machine and the ends of its spread: every operation at its fastest, or every operation at its slowest."""

    FAST = "fast"
    NOMINAL = "nominal"
    SLOW = "slow"


@dataclass(frozen=True, slots=True)
class Spread:
    """Factors on nominal seconds, ``fast <= 1 <= slow``."""

    fast: float
    slow: float

    def at(self, end: End) -> float:
        return {End.FAST: self.fast, End.NOMINAL: 1.0, End.SLOW: self.slow}[end]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """Forward seconds of one flash attention call,

        launch_s + width * (s_per_query * queries + s_per_key * keys + 4 * pairs / flop_per_s)

    with width = heads * head_dim, queries and keys summed over the call's spans, and pairs the (query, key) pairs that
    the mask allows. The terms for queries and keys make short spans slow: ramp-up, partial tiles, moving q, k, v, out.
    """

    launch_s: float
    s_per_query: float
    s_per_key: float
    flop_per_s: float

    def forward_s(
        self, *, calls: FloatArray | float, queries: FloatArray | float, keys: FloatArray | float,
        pairs: FloatArray | float, heads: FloatArray | float, head_dim: int,
    ) -> FloatArray:
        work = self.s_per_query * queries + self.s_per_key * keys + 4 * pairs / self.flop_per_s
        return np.asarray(self.launch_s * calls + heads * head_dim * work, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The fitted curve file. ``reference_flop_per_s``: peak times attention efficiency of the measured device.
    ``reference_bytes_per_s``: its memory rate.

    ``collective_steps``, ``collective_steps_per_rank``: before its bytes flow, a collective over n ranks waits for the
    first number plus n times the second, in link latencies. ``pass_s``: fixed seconds of a kernel that moves bytes.
    """

    attention: AttentionCurve
    attention_spread: Spread
    backward_ratio: float
    backward_spread: Spread
    reference_flop_per_s: float
    reference_bytes_per_s: float
    collective_steps: float
    collective_steps_per_rank: float
    pass_s: float
    link_spread: Spread
    linear_spread: Spread
    inter_spread: Spread
    host_spread: Spread
    sources: tuple[tuple[str, str], ...]


def load_curves() -> Curves:
    """Read and fit the curve file that comes with the planner."""
    from planner.inputs.yaml_file import read_yaml  # here, so that importing the planner stays fast

    data = read_yaml(Path(__file__).parent / "curves" / "h100.yaml", "curve file h100.yaml")
    attention, spread = fit_attention(data["attention"])
    steps, steps_per_rank, link_spread = _fit_collectives(data["collectives"])
    backward, products, rates = data["attention_backward"], data["matrix_products"], data["rates"]
    typical = products["efficiency_p50"]
    return Curves(
        attention=attention,
        attention_spread=spread,
        backward_ratio=backward["nominal"],
        backward_spread=Spread(backward["low"] / backward["nominal"], backward["high"] / backward["nominal"]),
        reference_flop_per_s=float(data["attention"]["peak_flop_per_s"]) * data["attention"]["attention_efficiency"],
        reference_bytes_per_s=float(data["attention"]["memory_bytes_per_s"]),
        collective_steps=steps,
        collective_steps_per_rank=steps_per_rank,
        pass_s=float(data["memory_passes"]["fixed_s"]),
        link_spread=link_spread,
        linear_spread=Spread(typical / products["efficiency_p90"], typical / products["efficiency_p10"]),
        inter_spread=Spread(1 / rates["inter_node_high"], 1 / rates["inter_node_low"]),
        host_spread=Spread(1 / rates["host_high"], 1 / rates["host_low"]),
        sources=tuple((name.replace("_", " "), data[name]["source"]) for name in data),
    )


def attention_features(data: dict[str, Any]) -> tuple[FloatArray, FloatArray]:
    """The terms in which the curve is linear (calls, width x queries, width x keys, width x 4 pairs), and the measured
    seconds.

    A row is (tokens, context parallel c, tensor parallel, milliseconds). Each of c zigzag ranks holds two chunks of
    tokens / 2c, whose keys sum to (2c + 1) / 2c of the document; with c = 1 it is a single span.
    """
    rows = np.array(data["rows"], dtype=np.float64)
    tokens, split = rows[:, 0], rows[:, 1]
    width = data["num_query_heads"] * data["head_dim"] / rows[:, 2]
    keys = np.where(split == 1, tokens, tokens * (2 * split + 1) / (2 * split))
    work = [tokens / split, keys, 2 * tokens * tokens / split]
    return np.stack([np.ones(len(rows)), *(width * each for each in work)], axis=1), rows[:, 3] * 1e-3


def fit_attention(data: dict[str, Any]) -> tuple[AttentionCurve, Spread]:
    """Fit by least squares of relative errors over the measured rows."""
    features, measured_s = attention_features(data)
    launch_s, query_s, key_s, flop_s = found = _fit_relative(features, measured_s)
    curve = AttentionCurve(launch_s=launch_s, s_per_query=query_s, s_per_key=key_s, flop_per_s=1 / flop_s)
    return curve, _spread(measured_s / (features @ np.array(found)))


def _fit_collectives(data: dict[str, Any]) -> tuple[float, float, Spread]:
    rows = np.array([row[1:] for row in data["rows"]], dtype=np.float64)
    trips = np.array([2.0 if row[0] == "all_reduce" else 1.0 for row in data["rows"]])
    ranks, num_bytes, measured_s = rows[:, 0], rows[:, 1], rows[:, 2] * 1e-6
    wire_bytes = trips * (ranks - 1) / ranks * num_bytes
    features = np.stack([np.ones(len(rows)), ranks, wire_bytes], axis=1)
    fixed_s, rank_s, _ = found = _fit_relative(features, measured_s)
    latency_s = float(data["link_latency_s"])
    return fixed_s / latency_s, rank_s / latency_s, _spread(measured_s / (features @ np.array(found)))


def _fit_relative(features: FloatArray, measured_s: FloatArray) -> tuple[float, ...]:
    weighted = features / measured_s[:, None]
    scale = np.sqrt((weighted**2).sum(axis=0))
    found, *_ = np.linalg.lstsq(weighted / scale, np.ones(len(measured_s)), rcond=None)
    return tuple(float(value) for value in found / scale)


def _spread(ratios: FloatArray) -> Spread:
    low, high = (float(value) for value in np.quantile(ratios, [_FIT_LOW, _FIT_HIGH]))
    return Spread(min(1.0, low), max(1.0, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineModel:
    """A cluster at one end of its spread. All links and rates are those of one device in one direction.

    ``nic_bytes_per_s``: rate of one NIC, which concurrent transfers share. A cluster file states the rate per device
    while all of them send.
    """

    cluster: ClusterSpec
    curves: Curves
    attention: AttentionCurve
    backward_ratio: float
    linear_factor: float
    intra_node: LinkSpec
    inter_node: LinkSpec
    nic_bytes_per_s: float
    host_bytes_per_s: float

    def at(self, end: End) -> MachineModel:
        """This nominal machine with every operation at one end of its spread."""
        if end is End.NOMINAL:
            return self
        curves = self.curves
        attention, inter = curves.attention_spread.at(end), curves.inter_spread.at(end)
        return replace(
            self,
            attention=_scaled(self.attention, launch=attention, move=attention, product=attention),
            backward_ratio=self.backward_ratio * curves.backward_spread.at(end),
            linear_factor=self.linear_factor * curves.linear_spread.at(end),
            intra_node=_slower(self.intra_node, curves.link_spread.at(end)),
            inter_node=_slower(self.inter_node, inter),
            nic_bytes_per_s=self.nic_bytes_per_s / inter,
            host_bytes_per_s=self.host_bytes_per_s / curves.host_spread.at(end),
        )

    def products_s(self, flop_per_token: float, tokens: FloatArray, weight_bytes: float) -> FloatArray:
        """Matrix products: whole tiles of tokens at the sustained rate, but at least the time to read the weights."""
        device = self.cluster.device
        tiles = np.ceil(tokens / TILE_TOKENS) * TILE_TOKENS
        flop_s = flop_per_token * tiles / (device.peak_flop_per_s * device.linear_efficiency)
        weights_s = np.where(tokens > 0, weight_bytes / device.memory_bytes_per_s, 0.0)
        return np.asarray(self.linear_factor * np.maximum(flop_s, weights_s), dtype=np.float64)

    def move_s(self, num_bytes: FloatArray | float, num_kernels: int = 0) -> FloatArray:
        """Kernels that only move bytes through device memory; 0 where there are no bytes."""
        seconds = num_bytes / self.cluster.device.memory_bytes_per_s + num_kernels * self.curves.pass_s
        return np.asarray(self.linear_factor * np.where(np.asarray(num_bytes) > 0, seconds, 0.0), dtype=np.float64)

    def collective_latency_s(self, num_ranks: int, ranks_per_node: int) -> float:
        """Seconds before bytes flow: the measured curve within a node, plus one network latency per further node."""
        if num_ranks <= 1:
            return 0.0
        near, nodes = min(num_ranks, ranks_per_node), math.ceil(num_ranks / ranks_per_node)
        steps = self.curves.collective_steps + self.curves.collective_steps_per_rank * near
        return steps * self.intra_node.latency_s + (nodes - 1) * self.inter_node.latency_s


def machine_model(cluster: ClusterSpec, curves: Curves) -> MachineModel:
    """The nominal machine of a cluster."""
    inter = cluster.inter_node
    product, move = _ratios(cluster, curves)
    sharing = max(1.0, cluster.devices_per_node / cluster.nics_per_node)
    return MachineModel(
        cluster=cluster,
        curves=curves,
        attention=_scaled(curves.attention, launch=1.0, move=move, product=product),
        backward_ratio=curves.backward_ratio,
        linear_factor=1.0,
        intra_node=cluster.intra_node,
        inter_node=inter,
        nic_bytes_per_s=inter.bytes_per_s * sharing,
        host_bytes_per_s=cluster.host.copy_bytes_per_s,
    )


def scale_note(cluster: ClusterSpec, curves: Curves) -> str | None:
    """A note that the measured curves are used for another device; None on the measured device."""
    product, move = _ratios(cluster, curves)
    if abs(product - 1) < 0.01 and abs(move - 1) < 0.01:
        return None
    return (
        f"guess: attention on {cluster.device.name} as measured on an H100, with products {1 / product:.3g} times as "
        f"fast (peak times attention_efficiency) and per-token work {1 / move:.3g} times as fast (memory rate)"
    )


def _ratios(cluster: ClusterSpec, curves: Curves) -> tuple[float, float]:
    """Seconds of a product and of a moved byte, relative to the measured device."""
    device = cluster.device
    product = curves.reference_flop_per_s / (device.peak_flop_per_s * device.attention_efficiency)
    return product, curves.reference_bytes_per_s / device.memory_bytes_per_s


def _scaled(curve: AttentionCurve, *, launch: float, move: float, product: float) -> AttentionCurve:
    return AttentionCurve(
        launch_s=curve.launch_s * launch, s_per_query=curve.s_per_query * move, s_per_key=curve.s_per_key * move,
        flop_per_s=curve.flop_per_s / product,
    )


def _slower(link: LinkSpec, factor: float) -> LinkSpec:
    return replace(link, bytes_per_s=link.bytes_per_s / factor, latency_s=link.latency_s * factor)
