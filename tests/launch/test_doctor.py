"""The guard around our five import names, and the report of ``longhaul doctor``."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launch import doctor
from planner.errors import LonghaulError, SpecError

ROOT = Path(__file__).resolve().parents[2]


def test_this_checkout_owns_its_names() -> None:
    assert doctor.check_import_names() == []


def test_another_distribution_with_our_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"trainer": ["longhaul", "coqui-tts-trainer"], "launch": ["Longhaul"], "yaml": ["PyYAML"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: owners)
    problems = doctor.check_import_names()
    assert len(problems) == 1
    assert problems[0].startswith("import name 'trainer' is also installed by coqui-tts-trainer: ")
    with pytest.raises(LonghaulError, match="coqui-tts-trainer"):
        doctor.refuse_foreign_names()


def test_an_installed_neighbour_is_found_in_its_record(tmp_path: Path) -> None:
    info = tmp_path / "acme_trainer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-trainer\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("trainer\n")
    result = run_guard(after_our_path=tmp_path)
    assert "is also installed by acme-trainer" in result


def test_a_folder_that_shadows_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "__init__.py").touch()
    result = run_guard(before_our_path=tmp_path)
    assert f"import name 'memory' resolves to {tmp_path / 'memory' / '__init__.py'}" in result
    assert "'trainer'" not in result


def run_guard(*, before_our_path: Path | None = None, after_our_path: Path | None = None) -> str:
    path = [str(folder) for folder in (before_our_path, ROOT, after_our_path) if folder is not None]
    code = f"import sys; sys.path[:1] = {path!r}\nfrom launch import doctor\nprint(doctor.check_import_names())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_report_lists_versions_and_ends_with_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict: ready to train"
    for name in ("python", "torch", "megatron-core", "pulp", "highspy", "flash-attn", "cores", "memory", "backends"):
        assert any(line.startswith(f"{name} ") for line in lines), name


def test_a_missing_requirement_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "pulp":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert doctor.run([]) == 1
    out = capsys.readouterr().out
    assert "problem: pulp is not installed" in out
    assert out.endswith("verdict: not ready (1 problem(s) above)\n")


def test_arguments_are_refused() -> None:
    with pytest.raises(SpecError, match="--fast"):
        doctor.run(["--fast"])
