"""Every law can fail: each check on a snippet that breaks it and on one that does not."""

import ast
from collections.abc import Callable

import pytest

from tests.laws import checks


def breaches(check: Callable[[str, ast.Module], list[str]], path: str, text: str) -> int:
    return len(check(path, ast.parse(text)))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("planner/a.py", "import torch", 1),
        ("planner/a.py", "def f():\n    from megatron.core import tensor_parallel", 1),
        ("planner/a.py", "from trainer.settings.tree import TrainConfig", 1),
        ("parallel/a.py", "import memory.swap", 1),
        ("memory/a.py", "from parallel import comm", 1),
        ("trainer/a.py", "from launch import environment", 1),
        ("trainer/a.py", "from . import config", 1),
        ("trainer/a.py", "from tests.ranks import run", 1),
        ("trainer/a.py", "import torch\nfrom parallel import comm\nfrom planner.plan import StepPlan", 0),
        ("launch/a.py", "import planner, parallel, memory, trainer", 0),
    ],
)
def test_import_direction(path: str, text: str, expected: int) -> None:
    assert breaches(checks.check_import_direction, path, text) == expected


def test_sizes() -> None:
    long_file = "x = 1\n" * (checks.MAX_FILE_LINES + 1)
    long_function = "class A:\n    def f(self):\n" + "        x = 1\n" * checks.MAX_FUNCTION_LINES
    assert len(checks.check_sizes("planner/a.py", long_file)) == 1
    expected = f"planner/a.py:f: {checks.MAX_FUNCTION_LINES + 1} lines"
    assert checks.check_sizes("planner/a.py", long_function) == [expected]
    assert checks.check_sizes("planner/a.py", "def f():\n    return 1\n") == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("parallel/engine.py", "import torch.distributed as dist", 1),
        ("parallel/engine.py", "from torch import distributed", 1),
        ("parallel/engine.py", "from torch.distributed import ProcessGroup", 1),
        ("parallel/engine.py", "import torch\ntorch.distributed.all_reduce(x)", 1),
        ("parallel/comm.py", "import torch.distributed as dist\nfrom torch.distributed import P2POp", 0),
        ("trainer/loop.py", "from torch.distributed.fsdp import fully_shard", 1),
        ("parallel/sharding.py", "from torch.distributed.fsdp import fully_shard", 0),
        ("trainer/checkpoint/tensors.py", "import torch.distributed.checkpoint as dcp", 0),
        ("trainer/checkpoint/tensors.py", "import torch.distributed as dist", 1),
        ("planner/strategies/flexsp/strategy.py", "import pulp", 1),
        ("planner/strategies/flexsp/strategy.py", "from highspy import Highs", 1),
        ("planner/solver.py", "import pulp, highspy", 0),
        ("parallel/heads.py", "from flash_attn import flash_attn_func", 1),
        ("parallel/heads.py", "torch.ops.aten._flash_attention_forward(q)", 1),
        ("trainer/model/transformer.py", "F.scaled_dot_product_attention(q, k, v)", 1),
        ("parallel/kernel.py", "torch.ops.aten._flash_attention_forward(q)", 0),
        ("trainer/data.py", "import os\nos.environ['A']", 1),
        ("trainer/data.py", "from os import getenv, path", 1),
        ("launch/environment.py", "import os\nos.environ['A']", 0),
        ("planner/cost/model.py", "x = y / 2**30", 1),
        ("planner/cost/model.py", "x = y / 1e9 + z * 1024**3 + (1 << 20)", 3),
        ("planner/cost/model.py", "limit = 2**63 - 1\neps = 1e-6\nchunk_tokens = 1024", 0),
        ("planner/units.py", "GIB = 2**30", 0),
    ],
)
def test_one_place(path: str, text: str, expected: int) -> None:
    assert breaches(checks.check_one_place, path, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    global x\n    x = 1", 1),
        ("cache = {}", 1),
        ("seen: list[int] = []", 1),
        ("from collections import defaultdict\n_counts = defaultdict(int)", 1),
        ("_TABLE = {}\ndef f(x):\n    _TABLE[x] = 1", 1),
        ("NAMES = []\ndef f(x):\n    NAMES.append(x)", 1),
        ("NAMES = []\nNAMES += [1]", 1),
        ("register()", 1),
        ("for x in range(3):\n    pass", 1),
        ("_TABLE = {'a': 1}\n__all__ = ['f']\ndef f(x):\n    out = []\n    out.append(_TABLE[x])\n    return out", 0),
        ("T = TypeVar('T')\nif __name__ == '__main__':\n    main()", 0),
    ],
)
def test_module_state(text: str, expected: int) -> None:
    assert breaches(checks.check_module_state, "planner/a.py", text) == expected


def test_one_price() -> None:
    text = "seconds = fit.s_per_token2 * tokens**2"
    assert breaches(checks.check_one_price, "planner/strategies/search/bounds.py", text) == 1
    assert breaches(checks.check_one_price, "trainer/prices/chunk_prices.py", text) == 1
    assert breaches(checks.check_one_price, "planner/pricing/simulate.py", text) == 1
    assert breaches(checks.check_one_price, checks.PRICE_FILE, text) == 0
    assert breaches(checks.check_one_price, "planner/cost/fits.py", text) == 0


def test_file_names() -> None:
    assert checks.check_file_name("planner/queue.py")
    assert checks.check_file_name("trainer/signal.py")
    assert not checks.check_file_name("planner/plan.py")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(" Exception", 1), (" BaseException as e", 1), ("", 1), (" (OSError, Exception)", 1), (" (OSError, KeyError)", 0)],
)
def test_exceptions(kind: str, expected: int) -> None:
    assert breaches(checks.check_exceptions, "planner/a.py", f"try:\n    f()\nexcept{kind}:\n    pass") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("dcp.load(path, weights_only=False)", 1),
        ("numpy.load(path, allow_pickle=True)", 1),
        ("datasets.load_dataset(name, trust_remote_code=True)", 1),
        ("yaml.load(text)", 1),
        ("yaml.load(text, Loader=yaml.FullLoader)", 1),
        ("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nyaml.load(text, Loader=_Strict)\njson.load(f)", 0),
    ],
)
def test_unsafe_loading(text: str, expected: int) -> None:
    assert breaches(checks.check_unsafe_loading, "trainer/a.py", text) == expected


def test_foreign_text() -> None:
    home, registry = "/" + "home/ada/data", "https://" + "pypi" + ".org/simple"
    expected = f"a.md:1: names a path of somebody's machine: see {home}"
    assert checks.check_foreign_text("a.md", f"see {home}") == [expected]
    assert len(checks.check_foreign_text("a.md", f"ok\npip install --{'index'}-url {registry}")) == 1
    assert checks.check_foreign_text("a.md", "trainer/work/x.py, ~/opt/x, ./root/x, https://a.org/home/x") == []


def test_third_party_imports() -> None:
    text = "import os, torch\nfrom planner import plan\nimport yaml.nodes\n"
    text += "try:\n    import flash_attn\nexcept ImportError:\n    pass"
    assert checks.third_party_imports(ast.parse(text)) == {"torch", "yaml"}
