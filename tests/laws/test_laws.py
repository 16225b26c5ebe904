"""The laws of the design, checked on the whole repository."""

import ast
import fnmatch
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from tests.laws import checks

ROOT = Path(__file__).resolve().parents[2]
# "path" or "path:function" -> why it may be too long. Only breaches that exist may stand here.
SIZE_EXCEPTIONS: dict[str, str] = {}
MODULE_TO_DISTRIBUTION = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "megatron": "megatron-core"}
# Used only if found (plotly: asked for by name, in the extra `report`); never a requirement.
OPTIONAL_MODULES = {"flash_attn", "plotly"}


def sources() -> dict[str, str]:
    """Text of every Python file of the five packages, by path."""
    paths = [path for package in checks.PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def repository_files() -> list[Path]:
    """What git holds or would hold; without git, everything outside of hidden and built folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = (*checks.PACKAGES, "tests", "benchmarks", "docs")
        return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def setup_arguments() -> dict[str, Any]:
    """The keyword arguments that setup.py gives to setuptools."""
    seen: dict[str, Any] = {}
    fake = ModuleType("setuptools")
    fake.setup = seen.update  # type: ignore[attr-defined]
    fake.find_packages = lambda include: include  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"setuptools": fake}):
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "check",
    [
        checks.check_import_direction,
        checks.check_one_place,
        checks.check_one_price,
        checks.check_module_state,
        checks.check_exceptions,
        checks.check_unsafe_loading,
    ],
)
def test_source_laws(check: Callable[[str, ast.Module], list[str]]) -> None:
    found = [line for path, text in sources().items() for line in check(path, ast.parse(text))]
    assert not found, "\n" + "\n".join(found)


def test_sizes() -> None:
    found = [line for path, text in sources().items() for line in checks.check_sizes(path, text)]
    offenders = {line.rpartition(": ")[0]: line for line in found}
    unlisted = [line for place, line in offenders.items() if place not in SIZE_EXCEPTIONS]
    assert not unlisted, "\n" + "\n".join(unlisted)
    assert not SIZE_EXCEPTIONS.keys() - offenders.keys(), "exceptions that are no longer needed"


def test_file_names() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts]
    found = [line for name in names if name.split("/")[0] in checks.PACKAGES for line in checks.check_file_name(name)]
    assert not found


def test_planner_imports_without_torch() -> None:
    names = [path[:-3].replace("/", ".") for path in sources() if path.startswith("planner/")]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'megatron'))); import importlib\n"
    assert python(blocked + f"for name in {names!r}: importlib.import_module(name)\nprint('done')") == "done\n"


def test_every_folder_with_python_is_a_package() -> None:
    folders = {(ROOT / path).parent for path in sources()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert setup_arguments()["packages"] == [pattern for name in checks.PACKAGES for pattern in (name, f"{name}.*")]


def test_data_files_are_shipped() -> None:
    patterns = setup_arguments()["package_data"]
    missing = []
    for package in checks.PACKAGES:
        files = [path for path in repository_files() if path.is_relative_to(ROOT / package) and path.suffix != ".py"]
        names = [path.relative_to(ROOT / package).as_posix() for path in files]
        missing += [name for name in names if not any(fnmatch.fnmatch(name, glob) for glob in patterns[package])]
        assert "py.typed" in names
    assert not missing


def test_requirements_cover_the_imports() -> None:
    required = {re.split(r"[<>=!~ \[]", line)[0].lower() for line in setup_arguments()["install_requires"]}
    imported = {name for text in sources().values() for name in checks.third_party_imports(ast.parse(text))}
    needed = {MODULE_TO_DISTRIBUTION.get(name, name).lower() for name in imported - OPTIONAL_MODULES}
    assert not needed - required


def test_files_name_no_machine_and_no_registry() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += checks.check_foreign_text(path.relative_to(ROOT).as_posix(), text)
    assert not found, "\n" + "\n".join(found)
