"""README, CONTRIBUTING and docs/ name what is there, and every command line they show is one that is taken."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import step_picture
from launch import calibrate_command, cli, local, plan_command, report_command, reproduce_command
from launch.plan_job import read_job
from planner.errors import SpecError
from planner.plan import AttentionKind
from planner.step_planner import STRATEGIES, plan_step
from tests.docs.pages import ROOT, Page, all_pages, read
from tests.planner.step_cases import make_cost, make_limits
from tests.plans import step_problem
from trainer.settings.flags import _options
from trainer.settings.resolve import resolve_config
from trainer.settings.tree import TrainConfig

PAGES = all_pages()


class _Parsed(Exception):
    """A benchmark's parser took its arguments."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that readers are told to have."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "one.txt").write_text("a text")
    (folder / "lengths.txt").write_text("1000\n300000\n" * 8)
    (folder / "my.yaml").write_text("run: {steps: 5}\n")
    (folder / "my_model.yaml").write_bytes((ROOT / "planner/inputs/models/llama-3-8b.yaml").read_bytes())
    for file in ("machine.yaml", "runs/mine/cost-refit.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("not read here")
    (folder / "docs").mkdir()
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def _plan(words: list[str]) -> None:
    flags = plan_command._parser().parse_args(words)
    assert flags.strategy in (*STRATEGIES, "all")
    read_job(flags)


def _calibrate(words: list[str]) -> None:
    with mock.patch.object(local, "launch", return_value=7):
        assert calibrate_command.run(words) == 7


LONGHAUL: dict[str, Callable[[list[str]], object]] = {
    "train": resolve_config,
    "plan": _plan,
    "report": lambda words: report_command._parser().parse_args(words),
    "reproduce": lambda words: [reproduce_command._system(word) for word in words],
    "calibrate": _calibrate,
    "doctor": lambda words: words == [] or pytest.fail(f"doctor {words}"),
}


def _module(words: list[str]) -> None:
    """``python -m NAME ...`` up to the point where its arguments are parsed."""
    name, *rest = words
    if name == "pytest":
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        parse(parser, arguments)
        raise _Parsed

    main = importlib.import_module(name).main
    with (
        mock.patch.object(sys, "argv", [name, *rest]), mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        pytest.raises(_Parsed),
    ):
        main(rest) if inspect.signature(main).parameters else main()


def take(words: list[str]) -> None:
    """Fails where the command line would be refused."""
    while "=" in words[0]:  # an environment variable
        words = words[1:]
    program, *rest = words
    assert rest, words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        settings = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or word.split("=")[0] in settings for word in rest)
    elif program == "torchrun":
        at = rest.index("-m")
        assert rest[at + 1] == "launch.cli"
        take(["longhaul", *rest[at + 2:]])
    elif program == "python":
        assert rest[0] == "-m"
        _module(rest[1:])
    else:
        assert program == "longhaul" and (rest[0] in LONGHAUL or rest[0].startswith("--"))
        if len(rest) > 1 and "--help" not in rest:  # a command's name alone is talked about, not shown
            LONGHAUL[rest[0]](rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
def test_what_a_page_names_is_there(page: Page) -> None:
    assert not list(page.missing())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
def test_commands_are_taken(page: Page, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    refused = []
    for words in page.commands():
        try:
            take(list(words))
        except (SpecError, SystemExit, AssertionError, ValueError) as error:
            refused.append(f"{' '.join(words)}: {error}")
    assert not refused, "\n".join(refused)


def test_flags_named_alone_exist() -> None:
    known = set(_options(TrainConfig)) | {"--help", "--print-config", "--part", "--out", "--step", "--refit"}
    parsers = (plan_command._parser(), report_command._parser(), reproduce_command._parser())
    known |= {flag for parser in parsers for flag in parser._option_string_actions}
    named = {code.split()[0].split("=")[0] for page in PAGES for code in page.inline() if code.startswith("--")}
    assert named and not named - known


def test_a_wrong_page_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(
        "# A\n[x](gone.md) [y](#b) `planner/gone.py` `planner.gone.name` `planner.plan.Gone` `planner/plan.py`\n"
        "```\nlonghaul train --stepz 5\nlonghaul plan --lengths githup\npython -m benchmarks.planner --fast\n"
        "make trian\nlonghaul reproduce flexps\n```\n"
    )
    page = read(file)
    assert len(list(page.missing())) == 5
    commands = page.commands()
    assert len(commands) == 5
    for words in commands:
        with pytest.raises((SpecError, SystemExit, AssertionError)):
            take(words)


def test_a_plan_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    commands = read(ROOT / "README.md").commands()
    (words,) = [words for words in commands if words[:2] == ["longhaul", "plan"]]
    assert cli.main([*words[1:], "--steps", "1"]) == 0
    assert capsys.readouterr().out.startswith("FITS")


def test_the_code_of_a_strategy_plans() -> None:
    (code,) = read(ROOT / "docs/strategies.md").blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "docs/strategies.md", "exec"), names)
    with mock.patch.dict(STRATEGIES, {"one-each": names["plan_one_each"]}):
        plan = plan_step(
            step_problem([300, 20, 500, 7], num_ranks=4, cost=make_cost(num_ranks=4), limits=make_limits()), step=0,
            strategy="one-each",
        )
    assert [microbatch.ranks for microbatch in plan.microbatches] == [(0,), (1,), (2,), (3,)]


def test_tables_are_complete() -> None:
    strategies, kinds = read(ROOT / "docs/strategies.md"), read(ROOT / "docs/attention_kinds.md")
    first_cells = re.findall(r"^\| (`.*?) \|", strategies.prose, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`([a-z-]+)`", cell)}
    assert set(STRATEGIES) == listed - {"--strategy"}
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `", kinds.prose, re.MULTILINE)
    assert set(rows) == {kind.value for kind in AttentionKind}
    readme = read(ROOT / "README.md").text
    assert f"| ways to share a sequence | **{len(AttentionKind) - 1}** |" in readme
    assert len(re.findall(r"^\| (?!word|-)", read(ROOT / "docs/glossary.md").prose, re.MULTILINE)) <= 20
    assert len(re.findall(r"^\| \d+ \|", read(ROOT / "docs/reading.md").prose, re.MULTILINE)) == 10
    assert readme.count("\n") <= 125


def test_the_picture_is_drawn() -> None:
    drawn = ElementTree.fromstring(step_picture.draw(step_picture.picture_problem()))
    kept = ElementTree.parse(ROOT / "docs/step_picture.svg").getroot()
    for picture in (drawn, kept):
        words = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
        seconds = [float(match[1]) for word in words if (match := re.match(r"([\d.]+) s per step", word))]
        assert "Planned by Longhaul" in words and len(seconds) == 2
        assert seconds[1] < seconds[0]
