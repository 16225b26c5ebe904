"""What a person can get wrong: clear lines on stderr, the right exit code, and no process started."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import cli, local
from tests.launch.tiny_run import train_arguments, write_corpus, write_cost
from trainer.checkpoint.manifests import FORMAT, MANIFEST, run_identity, write_manifest
from trainer.data.training_data import open_training_data
from trainer.settings.resolve import resolve_config

ROOT = Path(__file__).resolve().parents[2]


class Started(Exception):
    """The command found nothing wrong and would have started the ranks."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def launch(*arguments: object, **named: object) -> int:
        raise Started

    monkeypatch.setattr(local, "launch", launch)
    monkeypatch.setenv("LONGHAUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    write_cost(tmp_path / "cost.json")
    return tmp_path


Refuse = Callable[..., tuple[int, str]]


@pytest.fixture
def refuse(work: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the command with more flags; its exit code and its one line of stderr."""

    def run(*more: str, recipe: str | None = None) -> tuple[int, str]:
        verb, *flags = train_arguments(work, work / "run", *more)
        code = cli.main([verb, *([recipe] if recipe else []), *flags])
        errors = capsys.readouterr().err
        assert errors.startswith("longhaul: error: ")
        assert errors.count("\n") == 1
        assert "Traceback" not in errors
        assert not (work / "run" / "config.yaml").exists()
        return code, errors.removeprefix("longhaul: error: ").rstrip("\n")

    return run


def test_the_settings_of_these_tests_would_start(work: Path) -> None:
    with pytest.raises(Started):
        cli.main(train_arguments(work, work / "run"))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--stpes", "3"], ["unknown option --stpes", "did you mean --steps?"]),
        (["--steps"], ["--steps: a value is missing"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "0"], ["run.steps must be at least 1, got 0"]),
        (["--strategy", "static", "--degree", "5"], ["plan.degree (5) must be at most 4"]),
        (["--strategy", "static", "--degree", "0"], ["plan.degree must be at least 1, got 0"]),
        (["--degree", "2"], ["plan.degree is for plan.strategy static only"]),
        (["--world-size", "3", "--tensor-parallel", "2"], ["tensor_parallel (2) must divide run.world_size (3)"]),
        (["--tensor-parallel", "4"], ["parallel.tensor_parallel (4) must divide num_kv_heads (2)"]),
        (["--model.num-query-heads", "5"], ["num_query_heads (5) must be a multiple of num_kv_heads (2)"]),
        (["--model", "huge"], ["unknown model 'huge'"]),
        (["--strategy", "flexps"], ["'flexps' is unknown", "did you mean 'flexsp'?"]),
        (["--attention", "ulises"], ["plan.attention 'ulises' is unknown", "did you mean 'ulysses'?"]),
        (["--memory", "seco"], ["memory.policy seco needs memory.chunk_tokens"]),
        (["--memory", "keep", "--tier", "disk"], ["memory.tier is for memory.policy swap, seco, spaco and auto only"]),
        (["--lora-rank", "8"], ["model.lora_rank is not built yet"]),
        (["--pipeline-parallel", "2"], ["pipeline_parallel (2) is more than the 1 layers"]),
        (["--max-length", "512"], ["data.tokens_per_step (256) must be at least data.max_length (512)"]),
        (["--data", "nowhere"], ["'nowhere': no such file or folder"]),
        (["--tokenizer", "nowhere.json"], ["'nowhere.json': no such file"]),
        (["--plan.cost", "nowhere.yaml"], ["'nowhere.yaml': no such file"]),
        (["--plan.device-budget", "lots"], ["plan.device_budget", "'lots'"]),
    ],
)
def test_a_setting_that_cannot_be(refuse: Refuse, flags: list[str], parts: list[str]) -> None:
    code, line = refuse(*flags)
    assert code == 2
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: {stpes: 3}", ["recipe.yaml", "unknown key 'stpes'", "did you mean 'steps'?"]),
        ("modle: {preset: tiny}", ["recipe.yaml", "unknown key 'modle'", "did you mean 'model'?"]),
        ("run: [1, 2", ["recipe.yaml, line 1", "not valid YAML"]),
        ("run: {steps: many}", ["recipe.yaml.run.steps", "'many'"]),
    ],
)
def test_a_recipe_that_cannot_be(work: Path, refuse: Refuse, text: str, parts: list[str]) -> None:
    (work / "recipe.yaml").write_text(text)
    code, line = refuse(recipe="recipe.yaml")
    assert code == 2
    assert [part for part in parts if part not in line] == []


def _empty(folder: Path) -> None:
    folder.mkdir()


def _binary(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00binary")


def _bad_jsonl(file: Path) -> None:
    file.write_text('{"text": "a whole line"}\n{"text": "half a li\n')


def _no_field(file: Path) -> None:
    file.write_text('{"txet": "a whole line"}\n')


def _only_binary(folder: Path) -> None:
    folder.mkdir()
    _binary(folder / "picture.bin")


@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        ("empty", _empty, ["'", "empty", "the folder holds no visible file"]),
        ("picture.txt", _binary, ["picture.txt", "not UTF-8 text (byte 0)"]),
        ("lines.jsonl", _bad_jsonl, ["lines.jsonl:2: not a line of JSON"]),
        ("lines.jsonl", _no_field, ["lines.jsonl:1: no key 'text'", "did you mean 'txet'?", "data.text_field"]),
        ("pictures", _only_binary, ["no document with text in 1 files", "1 files that are not UTF-8 text"]),
    ],
)
def test_a_corpus_that_cannot_be(
    work: Path, refuse: Refuse, name: str, make: Callable[[Path], None], parts: list[str]
) -> None:
    make(work / name)
    code, line = refuse("--data", name)
    assert code == 2
    assert [part for part in parts if part not in line] == []


def test_an_unreadable_file(work: Path, refuse: Refuse) -> None:
    locked = work / "locked.txt"
    locked.write_text("text")
    locked.chmod(0)
    try:
        locked.read_bytes()
    except PermissionError:
        code, line = refuse("--data", "locked.txt")
        assert (code, line) == (2, "locked.txt: cannot be read (Permission denied)")
    else:
        pytest.skip("this user may read everything")


def test_more_ranks_than_sequences(work: Path, refuse: Refuse) -> None:
    write_corpus(work / "small", num_documents=3)
    code, line = refuse("--data", "small", "--world-size", "8")
    assert code == 2
    assert line.startswith("the corpus has 3 sequences for 8 data ranks: lower --world-size")


def test_dropping_leaves_nothing(refuse: Refuse) -> None:
    code, line = refuse("--data.over-length", "drop", "--max-length", "1")
    assert code == 2
    assert "no sample is left: all 120 documents are empty or longer than data.max_length (1)" in line


@pytest.mark.parametrize(
    ("policy", "what"), [("auto", "were split"), ("split", "were split"), ("drop", "were dropped (")]
)
def test_documents_over_the_limit_are_told(work: Path, policy: str, what: str) -> None:
    config = resolve_config(train_arguments(work, work / "run", "--data.over-length", policy)[1:])
    lines = open_training_data(config, work / "cache").describe()
    assert [line for line in lines if f"samples: 9 documents longer than that {what}" in line]


def test_a_sequence_that_fits_no_group(refuse: Refuse) -> None:
    code, line = refuse("--plan.device-budget", "10 B")
    assert code == 94
    assert "64 tokens" in line
    assert "needs 16 B" in line  # on each of the four ranks, the most there are
    assert "10 B" in line


def _set(cost: dict[str, Any], *path: str | int, value: Any) -> None:
    *way, last = path
    for key in way:
        cost = cost[key]  # type: ignore[index]
    cost[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda cost: cost.pop("memory"), ["missing key 'memory' of CostModel"]),
        (lambda cost: _set(cost, "times", 0, "fixed", value=1.0), ["times[0]", "unknown key 'fixed'", "'fixed_s'"]),
        (lambda cost: _set(cost, "times", 0, "fixed_s", value="fast"), ["times[0].fixed_s", "'fast'"]),
        (lambda cost: _set(cost, "times", 1, "s_per_token", value=-1.0), ["ulysses of degree 2", "0 or more"]),
        (lambda cost: _set(cost, "memory", "bytes_per_token", value=float("nan")), ["bytes_per_token", "0 or more"]),
        (lambda cost: _set(cost, "step_fixed_s", value=-0.5), ["step_fixed_s", "0 or more"]),
        (lambda cost: _set(cost, "times", value=[]), ["times", "local"]),
        (lambda cost: _set(cost, "sharding", value="zero3"), ["zero3", "gather_once"]),
    ],
)
def test_a_cost_file_that_cannot_be(
    work: Path, refuse: Refuse, change: Callable[[dict[str, Any]], object], parts: list[str]
) -> None:
    cost = json.loads((work / "cost.json").read_text())
    change(cost)
    (work / "cost.json").write_text(json.dumps(cost))
    code, line = refuse()
    assert code == 2
    assert [part for part in ["cost.json", *parts] if part not in line] == []


@pytest.mark.parametrize(("text", "part"), [("a: [1", ", line 1: not valid YAML"), ("", "expected a mapping")])
def test_a_cost_file_that_is_none(work: Path, refuse: Refuse, text: str, part: str) -> None:
    (work / "cost.json").write_text(text)
    code, line = refuse()
    assert code == 2
    assert part in line


def test_a_cost_file_without_the_degree(work: Path, refuse: Refuse) -> None:
    write_cost(work / "cost.json", degrees=(2, 4))
    code, line = refuse("--strategy", "static", "--degree", "3")
    assert code == 2
    assert line.startswith("degree 3 is not possible on 4 ranks")
    assert "possible: 1, 2, 4" in line


def write_checkpoint(work: Path, run_dir: Path, **changes: Any) -> None:
    """A checkpoint as preflight sees it: a manifest with the identity and the position of the tests' run."""
    config = resolve_config(train_arguments(work, run_dir)[1:])
    data = open_training_data(config, work / "cache")
    position = data.ledger.position(4)
    manifest = {
        "format": FORMAT, "files": {}, "next_step": 4, "run": run_identity(config, data.spec), "world_size": 4,
        "ledger": {"step": 4, "epoch": position.epoch, "offset": position.offset, "digest": position.digest},
        **changes,
    }
    folder = run_dir / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)


def test_a_run_folder_that_holds_a_run(work: Path, refuse: Refuse) -> None:
    write_checkpoint(work, work / "run")
    code, line = refuse()
    assert code == 2
    held = f"{work / 'run'} already holds a run (step-00000004)"
    assert line == f"{held}: add --resume to continue it, or --run-dir for a new one"


def test_resume_of_the_same_run_would_start(work: Path) -> None:
    write_checkpoint(work, work / "run")
    for same in ([], ["--world-size", "2"], ["--strategy", "static"], ["--checkpoint-every", "9"]):
        with pytest.raises(Started):
            cli.main(train_arguments(work, work / "run", "--resume", *same))


def test_resume_without_a_checkpoint(work: Path, refuse: Refuse) -> None:
    code, line = refuse("--resume")
    assert code == 96
    assert line.startswith(f"no loadable checkpoint in {work / 'run' / 'checkpoints'}; start without --resume")
    (work / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    assert refuse("--resume") == (code, line)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--seed", "1"], "run.seed 1234, this run has 1:"),
        (["--steps", "7"], "run.steps "),
        (["--model.num-layers", "2"], "model.num_layers 1, this run has 2:"),
        (["--tensor-parallel", "2"], "parallel.tensor_parallel 1, this run has 2:"),
        (["--optimizer.lr", "0.5"], "optimizer.lr "),
    ],
)
def test_resume_with_another_setting(work: Path, refuse: Refuse, flags: list[str], part: str) -> None:
    write_checkpoint(work, work / "run")
    code, line = refuse("--resume", *flags)
    assert code == 96
    assert f"step-00000004 was saved with {part}" in line


def test_resume_with_other_data(work: Path, refuse: Refuse) -> None:
    write_checkpoint(work, work / "run")
    (work / "corpus" / "document-001.txt").write_text("one document is another now")
    code, line = refuse("--resume")
    assert code == 2
    assert "the checkpoint was made with other data: corpus, tokenizer" in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "files": {}}'])
def test_resume_from_a_manifest_that_is_none(work: Path, refuse: Refuse, text: str) -> None:
    write_checkpoint(work, work / "run")
    (work / "run" / "checkpoints" / "step-00000004" / MANIFEST).write_text(text)
    code, line = refuse("--resume")
    assert code == 96
    assert "step-00000004: " in line


def test_a_run_folder_that_is_a_file(work: Path, refuse: Refuse) -> None:
    (work / "run").write_text("")
    code, line = refuse()
    assert code == 2
    assert "is not a folder" in line


def test_bad_input_is_answered_without_torch(work: Path) -> None:
    probe = "import sys; from launch import cli; code = cli.main(sys.argv[1:]); assert 'torch' not in sys.modules; " \
            "sys.exit(code)"
    arguments = train_arguments(work, work / "run", "--plan.device-budget", "10 B")
    result = subprocess.run(
        [sys.executable, "-c", probe, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 94
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
