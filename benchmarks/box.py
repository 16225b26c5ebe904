"""A cluster in a box: nodes with shaped network cards and ranks of fixed speed on one Linux machine, for benchmarks
and nightly tests.

Every rank has a network namespace of its own, with one address and two routes: to ranks of its node over an unshaped
bridge (which stands for NVLink), and to all other ranks through a network card of its node. A card is a virtual link
with a token bucket at both ends, so that it limits what leaves and what arrives. Ranks share a card where there are
fewer cards than ranks. A rank may be given a fixed share of one core (a CPU quota), so that its speed does not depend
on the others: without it an idle rank would lend its core to busy ones, which no GPU does. Nothing leaves the machine,
and everything is torn down at the end, also on failure.

    with Box(BoxSpec(num_nodes=2, ranks_per_node=4, nics_per_node=4, nic_bytes_per_s=25e6)) as box:
        outputs = box.run([sys.executable, "-m", "my.worker"], timeout_s=120)

Needs Linux, root and ``iproute2``; ``box_problem()`` says in one line why it cannot be built here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SUBNET = "10.213"  # used only inside the box's own namespaces
INTRA, NIC = "intra", "nic0"
BURST_BYTES = 64 * 1024
CPU_PERIOD_US = 10_000
CPU_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
QUEUE_S = 0.2
"""How long a packet may wait in a card's queue before it is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxSpec:
    """The cluster to build. ``nic_bytes_per_s``: rate of each card, each way. Consecutive ranks share a card, so
    ``ranks_per_node`` must be a multiple of ``nics_per_node``. ``cpu_share``: share of one core that each rank gets
    (None: no limit). Raises ValueError on impossible numbers."""

    num_nodes: int
    ranks_per_node: int
    nics_per_node: int
    nic_bytes_per_s: float
    cpu_share: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.ranks_per_node, self.nics_per_node) < 1 or self.nic_bytes_per_s <= 0:
            raise ValueError(f"a box needs at least one node, rank and card and a positive rate, got {self}")
        if self.ranks_per_node % self.nics_per_node:
            raise ValueError(f"{self.ranks_per_node} ranks cannot share {self.nics_per_node} cards evenly")
        if self.cpu_share is not None and not self.cpu_share > 0:
            raise ValueError(f"a rank in the box needs a share of a core above 0, got {self.cpu_share}")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def nic(self, rank: int) -> int:
        """The card of its node that this rank uses."""
        return rank % self.ranks_per_node * self.nics_per_node // self.ranks_per_node

    def address(self, rank: int) -> str:
        return f"{SUBNET}.{self.node(rank)}.{rank % self.ranks_per_node + 1}"


class BoxError(RuntimeError):
    """The box could not be built, or a rank in it failed."""


def box_problem() -> str | None:
    """Why a box cannot be built on this machine, in one line, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool!r} is missing: install iproute2"
    name = f"lhbox{os.getpid()}-probe"
    try:
        _sh("ip", "netns", "add", name)
        _sh("ip", "-n", name, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
        _sh("tc", "-n", name, "qdisc", "add", "dev", "probe0", "root", "tbf", "rate", "8mbit", "burst", "64kb",
            "latency", "50ms")
    except BoxError as error:
        return f"this machine does not allow it: {error}"
    finally:
        with suppress(BoxError):
            _sh("ip", "netns", "del", name)
    return None


class Box:
    """The cluster, which exists inside a ``with`` block. Entering raises BoxError where it cannot be built."""

    def __init__(self, spec: BoxSpec) -> None:
        self.spec = spec
        self._prefix = f"lhbox{os.getpid()}"
        self._names: list[str] = []
        self._quotas: list[Path] = []

    def __enter__(self) -> Box:
        try:
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float, port: int = 29500
    ) -> list[str]:
        """Run ``command`` on every rank with torchrun's variables set. Returns what each rank printed, by rank.

        The first rank to fail ends the others. Raises BoxError with the last lines of its output, also on a timeout.
        """
        with tempfile.TemporaryDirectory(prefix="longhaul-box-") as folder:
            logs = [Path(folder) / f"rank{rank}.log" for rank in range(self.spec.num_ranks)]
            processes = [
                self._start(rank, command, {**self.rank_env(rank, port), **(env or {})}, logs[rank])
                for rank in range(self.spec.num_ranks)
            ]
            try:
                failed = _wait_all(processes, timeout_s)
            finally:
                _kill_all(processes)
            outputs = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        if failed is not None:
            rank, why = failed
            raise BoxError(f"rank {rank} {why}; its last lines:\n{_tail(outputs[rank])}")
        return outputs

    def rank_env(self, rank: int, port: int) -> dict[str, str]:
        """torchrun's variables for this rank, and the network interface that gloo must use."""
        spec = self.spec
        return {
            "RANK": str(rank), "WORLD_SIZE": str(spec.num_ranks), "LOCAL_RANK": str(rank % spec.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(spec.ranks_per_node), "GROUP_RANK": str(spec.node(rank)),
            "MASTER_ADDR": spec.address(0), "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": INTRA,
        }

    def namespace(self, rank: int) -> str:
        return f"{self._prefix}-r{rank}"

    def shape_nic(self, node: int, nic: int, bytes_per_s: float) -> None:
        """Change a card's rate, both ways, for instance to slow it down in the middle of a run."""
        switch = f"{self._prefix}-switch"
        for device in (f"up{node}-{nic}", f"down{node}-{nic}"):
            _sh("tc", "-n", switch, "qdisc", "change", "dev", device, "root", *_bucket(bytes_per_s))

    def _start(
        self, rank: int, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        with log.open("wb") as sink:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(rank), *command], stdout=sink, stderr=subprocess.STDOUT,
                env={**os.environ, **env}, start_new_session=True,
            )
        if self._quotas:
            (self._quotas[rank] / "cgroup.procs").write_text(str(process.pid), encoding="utf-8")
        return process

    def _build(self) -> None:
        """Build the network. All bridges are in one namespace: one per node, one per card, and one between the cards
        (``core``)."""
        spec, switch = self.spec, self._namespace("switch")
        _bridge(switch, "core")
        for node in range(spec.num_nodes):
            _bridge(switch, f"node{node}")
            for nic in range(spec.nics_per_node):
                card, up, down = f"card{node}-{nic}", f"up{node}-{nic}", f"down{node}-{nic}"
                _bridge(switch, card)
                _sh("ip", "-n", switch, "link", "add", up, "type", "veth", "peer", "name", down)
                for device, bridge in ((up, card), (down, "core")):
                    _sh("ip", "-n", switch, "link", "set", device, "master", bridge, "up")
                    _sh("tc", "-n", switch, "qdisc", "add", "dev", device, "root", *_bucket(spec.nic_bytes_per_s))
        for rank in range(spec.num_ranks):
            self._add_rank(rank, switch)
            if spec.cpu_share is not None:
                self._quotas.append(_make_quota(self.namespace(rank), spec.cpu_share))

    def _add_rank(self, rank: int, switch: str) -> None:
        spec, name = self.spec, self._namespace(f"r{rank}")
        node = spec.node(rank)
        _sh("ip", "-n", name, "link", "set", "lo", "up")
        for device, bridge in ((INTRA, f"node{node}"), (NIC, f"card{node}-{spec.nic(rank)}")):
            port = f"r{rank}-{device}"
            _sh("ip", "link", "add", device, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            _sh("ip", "-n", switch, "link", "set", port, "master", bridge, "up")
            _sh("ip", "-n", name, "link", "set", device, "up")
        _sh("ip", "-n", name, "addr", "add", f"{spec.address(rank)}/24", "dev", INTRA)
        for other in range(spec.num_nodes):
            if other != node:
                _sh("ip", "-n", name, "route", "add", f"{SUBNET}.{other}.0/24", "dev", NIC, "src", spec.address(rank))

    def _namespace(self, suffix: str) -> str:
        name = f"{self._prefix}-{suffix}"
        _sh("ip", "netns", "add", name)
        self._names.append(name)
        return name

    def _tear_down(self) -> None:
        for name in reversed(self._names):  # devices vanish with their namespaces
            with suppress(BoxError):
                _sh("ip", "netns", "del", name)
        self._names.clear()
        for quota in self._quotas:
            with suppress(OSError):
                quota.rmdir()
        self._quotas.clear()


def _bridge(namespace: str, name: str) -> None:
    _sh("ip", "-n", namespace, "link", "add", name, "type", "bridge")
    _sh("ip", "-n", namespace, "link", "set", name, "up")


def _make_quota(name: str, share: float) -> Path:
    """Make a control group that limits its processes to this share of one core. Raises BoxError where there is no CPU
    controller."""
    for root in CPU_ROOTS:
        group, quota_us = root / name, int(CPU_PERIOD_US * share)
        with suppress(OSError):
            group.mkdir()
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text(f"{quota_us} {CPU_PERIOD_US}", encoding="utf-8")
                return group
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US), encoding="utf-8")
                (group / "cpu.cfs_quota_us").write_text(str(quota_us), encoding="utf-8")
                return group
        with suppress(OSError):
            group.rmdir()
    raise BoxError(f"no CPU controller under {' or '.join(map(str, CPU_ROOTS))}: a share of a core cannot be set")


def _bucket(bytes_per_s: float) -> tuple[str, ...]:
    queue_bytes = max(BURST_BYTES, int(bytes_per_s * QUEUE_S))
    return ("tbf", "rate", f"{int(bytes_per_s * 8)}bit", "burst", str(BURST_BYTES), "limit", str(queue_bytes))


def _sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BoxError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")


def _wait_all(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> tuple[int, str] | None:
    """Wait for all ranks. Returns the first rank that failed, or one that still ran at the timeout, and what happened;
    None where all ended well."""
    waiting = dict(enumerate(processes))
    deadline_s = time.monotonic() + timeout_s
    while waiting:
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code is None:
                continue
            del waiting[rank]
            if code != 0:
                return rank, f"ended with {code}"
        if waiting and time.monotonic() > deadline_s:
            return next(iter(waiting)), f"was still running after {timeout_s:.0f} s"
        time.sleep(0.02)
    return None


def _kill_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _tail(text: str, num_lines: int = 12) -> str:
    return "\n".join(text.splitlines()[-num_lines:])
