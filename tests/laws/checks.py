"""The laws of the design as checks on source text: each takes a path inside the repository and its syntax tree (or its
text) and returns one line per breach. ``test_checks.py`` shows that every one of them can fail."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.laws import rooms

PACKAGES = tuple(rooms.PACKAGES)
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 60

# Module prefix -> the files that may import it. The longest prefix that fits decides.
ONE_PLACE = {
    "torch.distributed": {"parallel/comm.py", "launch/doctor.py"},  # doctor asks which backends exist, no more
    "torch.distributed.device_mesh": {"parallel/mesh.py", "parallel/sharding.py"},
    "torch.distributed.fsdp": {"parallel/sharding.py"},
    "torch.distributed.tensor": {"parallel/sharding.py", "trainer/model/optimizer.py", "trainer/checkpoint/tensors.py"},
    "torch.distributed.checkpoint": {"trainer/checkpoint/tensors.py"},
    "torch.distributed.elastic": {"launch/local.py"},
    "torch.distributed.launcher": {"launch/local.py"},
    "pulp": {"planner/solver.py"},
    "highspy": {"planner/solver.py"},
    "ortools": {"planner/solver.py"},
    "flash_attn": {"parallel/kernel.py"},
    "torch.nn.attention": {"parallel/kernel.py"},
}
KERNEL_NAMES = re.compile(r"flash_attention|scaled_dot_product|efficient_attention|cudnn_attention|varlen_attn")
KERNEL_FILE = "parallel/kernel.py"
ENVIRONMENT_FILE = "launch/environment.py"
UNITS_FILE = "planner/units.py"
PRICE_FILE = "planner/pricing/microbatch.py"
QUADRATIC = "s_per_token2"
_UNIT_NUMBERS = {1e9, 1e12, 1e15, 2.0**20, 2.0**30, 2.0**40}
_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"}
_MUTATORS = {
    "append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "add", "discard", "popitem",
    "appendleft", "sort", "reverse",
}
_FOREIGN_TEXT = {
    "a path of somebody's machine": re.compile(r"(?<![\w.~}])/(?:work|root|home|Users|mnt|opt|scratch)/\w"),
    "a package registry": re.compile(r"(?:pypi|pythonhosted)\.(?:org|python)|download\.pytorch\.|index[-]url"),
}


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module named by an import, at any depth, with its line. ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def check_import_direction(path: str, tree: ast.AST) -> list[str]:
    """Law 1. Relative imports are refused too: they hide which package is meant."""
    package = PurePosixPath(path).parts[0]
    found = []
    for module, line in imported_modules(tree):
        top = module.split(".")[0]
        if top == "":
            found.append(f"{path}:{line}: relative import")
        elif top in PACKAGES and top not in (package, *rooms.PACKAGES[package]):
            found.append(f"{path}:{line}: {package} must not import {top}")
        elif package == "planner" and top in ("torch", "megatron"):
            found.append(f"{path}:{line}: planner must not import {top}")
        elif top in ("tests", "benchmarks"):
            found.append(f"{path}:{line}: a package must not import {top}")
    return found


def check_sizes(path: str, text: str) -> list[str]:
    """Law 2."""
    num_lines = text.count("\n") + 1
    found = [f"{path}: {num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.name}: {length} lines")
    return found


def check_one_place(path: str, tree: ast.AST) -> list[str]:
    """Law 3: libraries, attention kernels, environment variables and unit constants, each in its own file."""
    found = []
    for module, line in imported_modules(tree):
        found += _misplaced(path, line, module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith("torch.distributed."):
                found += _misplaced(path, node.lineno, dotted)
            if KERNEL_NAMES.search(node.attr) and path != KERNEL_FILE:
                found.append(f"{path}:{node.lineno}: {dotted} belongs in {KERNEL_FILE}")
            if _is_environment(dotted) and path != ENVIRONMENT_FILE:
                found.append(f"{path}:{node.lineno}: {dotted} belongs in {ENVIRONMENT_FILE}")
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and path != ENVIRONMENT_FILE:
            names = [alias.name for alias in node.names if _is_environment(f"os.{alias.name}")]
            found += [f"{path}:{node.lineno}: os.{name} belongs in {ENVIRONMENT_FILE}" for name in names]
        elif _is_unit(node) and path != UNITS_FILE:
            found.append(f"{path}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)} belongs in {UNITS_FILE}")
    return found


def _misplaced(path: str, line: int, module: str) -> list[str]:
    prefixes = [prefix for prefix in ONE_PLACE if module == prefix or module.startswith(prefix + ".")]
    if not prefixes or path in ONE_PLACE[max(prefixes, key=len)]:
        return []
    return [f"{path}:{line}: {module} belongs in {', '.join(sorted(ONE_PLACE[max(prefixes, key=len)]))}"]


def _is_environment(dotted: str) -> bool:
    return dotted in ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")


def _is_unit(node: ast.AST) -> bool:
    """1e9, 2**30, 1024**3, 10**12, 1 << 30 and the like; powers that are limits of integers (2**63) are not units."""
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float) and float(node.value) in _UNIT_NUMBERS
    if not isinstance(node, ast.BinOp):
        return False
    base, exponent = getattr(node.left, "value", None), getattr(node.right, "value", None)
    if isinstance(node.op, ast.Pow):
        return (base in (2, 2.0) and exponent in (20, 30, 40)) or (base == 10 and exponent in (6, 9, 12, 15)) or (
            base in (1000, 1024)
        )
    return isinstance(node.op, ast.LShift) and exponent in (20, 30, 40)


def check_module_state(path: str, tree: ast.Module) -> list[str]:
    """Law 4: no ``global``, nothing mutable that is not a constant, no constant that is changed, no work at import."""
    found = [f"{path}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    tables = set()
    for node in tree.body:
        for name, value in _assigned(node):
            if not _is_mutable(value):
                continue
            if name.strip("_").isupper() or name == "__all__":
                tables.add(name)
            else:
                found.append(f"{path}:{node.lineno}: module state {name!r}")
        if isinstance(node, ast.For | ast.While | ast.With) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            found.append(f"{path}:{node.lineno}: work at import")
    return found + [f"{path}:{line}: constant {name!r} is changed" for name, line in _changes(tree, tables)]


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
        yield node.target.id, node.value


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in _MUTABLE_CALLS


def _changes(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        target: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
            target = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        if isinstance(target, ast.Name) and target.id in names:
            yield target.id, target.lineno


def check_file_name(path: str) -> list[str]:
    """Law 9."""
    stem = PurePosixPath(path).stem
    return [f"{path}: {stem} is a module of the standard library"] if stem in sys.stdlib_module_names else []


def check_exceptions(path: str, tree: ast.AST) -> list[str]:
    """No handler that catches everything: it hides the failures that nobody thought of."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else [ast.unparse(node.type)]
            if isinstance(node.type, ast.Tuple):
                caught = [ast.unparse(kind) for kind in node.type.elts]
            if not caught or {"Exception", "BaseException"}.intersection(caught):
                found.append(f"{path}:{node.lineno}: catches everything")
    return found


def check_unsafe_loading(path: str, tree: ast.AST) -> list[str]:
    """Nothing that runs code out of a data file."""
    found = [
        f"{path}:{line}: {module}" for module, line in imported_modules(tree) if module.split(".")[0] in _PICKLES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        called = ast.unparse(node.func)
        is_unsafe = (
            (called == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("weights_only") == "False"
            or keywords.get("allow_pickle") == "True"
            or keywords.get("trust_remote_code") == "True"
            or called in ("yaml.unsafe_load", "yaml.full_load")
            or (called == "yaml.load" and keywords.get("Loader", "yaml.Loader").startswith("yaml."))
        )
        if is_unsafe:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def check_one_price(path: str, tree: ast.AST) -> list[str]:
    """Seconds of a microbatch are computed in one place: nobody else reads the quadratic coefficient."""
    if path.startswith("planner/cost/") or path == PRICE_FILE:
        return []
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == QUADRATIC]
    return [f"{path}:{node.lineno}: {QUADRATIC} is read in planner/cost/ and {PRICE_FILE} only" for node in reads]


def check_foreign_text(path: str, text: str) -> list[str]:
    """Files work on any machine: no path and no registry that only one of them has."""
    return [
        f"{path}:{number}: names {what}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in _FOREIGN_TEXT.items()
        if pattern.search(line)
    ]


def third_party_imports(tree: ast.AST) -> set[str]:
    """Top-level names of imports from outside that the code needs: those in ``try: except ImportError`` it does not."""
    optional = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type)
        for body in node.body
        for _, line in imported_modules(body)
    }
    return {
        module.split(".")[0]
        for module, line in imported_modules(tree)
        if line not in optional and module.split(".")[0] not in {*PACKAGES, *sys.stdlib_module_names, ""}
    }
