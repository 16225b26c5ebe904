"""Result files: refused in time, whole or untouched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.result_file import check_target, write_result
from planner.errors import SpecError


@pytest.mark.parametrize(("target", "words"), [
    ("no/folder/x", "folder no/folder does not exist"), (".", "is a folder"), ("", "'' is no name; name a file"),
])
def test_impossible_targets_are_refused_before_the_work(target: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        check_target("--html", target)
    assert str(refused.value).startswith("--html: ")
    check_target("--html", None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_and_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o444)
    tmp_path.chmod(0o555)
    for name in ("new", "old"):
        with pytest.raises(SpecError, match="Permission denied"):
            check_target("--json", str(tmp_path / name))
    tmp_path.chmod(0o755)


def test_a_write_that_is_stopped_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plan.json"
    write_result("--json", str(target), "old")
    write = Path.write_text

    def stopped(path: Path, text: str, **how: str) -> int:
        write(path, text[: len(text) // 2], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_result("--json", str(target), "new and longer")
    monkeypatch.undo()
    assert (target.read_text(), list(tmp_path.iterdir())) == ("old", [target])
    write_result("--json", str(target), "new")
    assert (target.read_text(), list(tmp_path.iterdir())) == ("new", [target])


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write_result("--json", str(link), "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    write_result("--json", os.devnull, "text")
    assert not Path(os.devnull).is_file()
    if Path("/dev/full").exists():
        with pytest.raises(SpecError, match="--json: cannot write /dev/full .No space left"):
            write_result("--json", "/dev/full", "text")
