"""Settings: three layers, strict everywhere, every mistake found before anything starts."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memory.policy import RECOMPUTE_ALL, ActivationPolicy
from planner.codec import to_plain
from planner.cost.data_sheet import derive_cost
from planner.errors import SpecError
from planner.inputs.files import load_cluster, load_model
from trainer.prices.plan_inputs import load_run_cost
from trainer.settings.check import KEPT_LAYERS, check_config
from trainer.settings.resolve import config_to_yaml, load_recipe, recipe_names, resolve_config
from trainer.settings.tree import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig, model_spec

ROOT = Path(__file__).resolve().parents[3]


def refusal(arguments: list[str]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        resolve_config(arguments)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_give_the_defaults() -> None:
    assert resolve_config([]) == TrainConfig() == load_recipe("laptop")


def test_built_in_recipes_are_legal() -> None:
    assert set(recipe_names()) >= {"laptop", "bench-skewed"}
    for name in recipe_names():
        assert check_config(load_recipe(name)) == ()


def test_flags_win_over_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run: {steps: 7, seed: 9}\noptimizer: {lr: 1e-4}\nmodel:\n")
    config = resolve_config([recipe, "--run.steps", "8", "--optimizer.beta1=0.5"])
    assert config.run == RunConfig(steps=8, seed=9)
    assert config.optimizer == OptimizerConfig(lr=1e-4, beta1=0.5)
    assert config.model == ModelConfig()


SHORT_FORMS = {
    "--run-dir": ("run.dir", "x", "x"), "--steps": ("run.steps", "5", 5), "--seed": ("run.seed", "5", 5),
    "--world-size": ("run.world_size", "2", 2), "--dtype": ("run.dtype", "bf16", "bf16"),
    "--checkpoint-every": ("run.checkpoint_every", "0", 0), "--tensor-parallel": ("parallel.tensor_parallel", "2", 2),
    "--pipeline-parallel": ("parallel.pipeline_parallel", "1", 1), "--strategy": ("plan.strategy", "static", "static"),
    "--attention": ("plan.attention", "ring", "ring"), "--memory": ("memory.policy", "keep", "keep"),
    "--data": ("data.path", str(ROOT), str(ROOT)), "--tokenizer": ("data.tokenizer", __file__, __file__),
    "--max-length": ("data.max_length", "64", 64), "--tokens-per-step": ("data.tokens_per_step", "9999", 9999),
    "--model": ("model.preset", "tiny", "tiny"),
}


@pytest.mark.parametrize(("flag", "expected"), SHORT_FORMS.items())
def test_short_forms(flag: str, expected: tuple[str, str, object]) -> None:
    name, text, value = expected
    section, field = name.split(".")
    with_underscores = "--" + flag.removeprefix("--").replace("-", "_")
    spellings = ([flag, text], [f"{flag}={text}"], [f"--{name}", text], [with_underscores, text])
    for arguments in spellings:
        assert getattr(getattr(resolve_config(arguments), section), field) == value, arguments


def test_short_forms_of_swapping() -> None:
    memory = resolve_config(["--memory", "swap", "--swap-fraction", "0.25", "--tier", "disk"]).memory
    assert (memory.policy, memory.swap_fraction, memory.tier) == ("swap", 0.25, "disk")
    memory = resolve_config(["--memory", "seco", "--chunk-tokens", "64", "--tier", "disk"]).memory
    assert (memory.policy, memory.chunk_tokens, memory.tier) == ("seco", 64, "disk")


def test_chunked_training_has_its_flags() -> None:
    memory = resolve_config(["--memory", "spaco", "--chunk-tokens", "64", "--sample-fraction", "0.125"]).memory
    assert (memory.policy, memory.chunk_tokens, memory.sample_fraction) == ("spaco", 64, 0.125)
    assert resolve_config(["--memory", "seco", "--chunk-tokens", "64"]).memory.sample_fraction is None


@pytest.mark.parametrize("arguments", [
    ["--init-from", "x"], ["--lora-rank", "8"],
])
def test_short_forms_of_later_features_exist_and_are_refused(arguments: list[str]) -> None:
    lines = refusal(["--strategy", "static", *arguments])
    assert len(lines) == 1 and "is not built yet; available: " in lines[0]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--resume"], True), (["--resume", "--steps", "5"], True), (["--resume", "true"], True), (["--resume=yes"], True),
    (["--no-resume"], False), (["--resume", "false"], False), (["--run.resume=no"], False), ([], False),
    (["--resume", "--run.no-resume"], False), (["--run.no_resume", "--resume"], True),
])
def test_boolean_flags(arguments: list[str], expected: bool) -> None:
    assert resolve_config(arguments).run.resume is expected


def test_optional_values_and_last_flag_wins() -> None:
    config = resolve_config(["--model.qk-norm", "true", "--model.tied-head", "--steps", "1", "--run.steps", "2"])
    assert (config.model.qk_norm, config.model.tied_head, config.run.steps) == (True, True, 2)
    assert resolve_config(["--model.qk-norm", "none"]).model.qk_norm is None
    assert resolve_config(["--optimizer.clip-norm", "inf"]).optimizer.clip_norm == float("inf")


# One line each, holding these words: the name that is wrong and what to do about it.
BAD_FLAGS = [
    (["--run.setps", "5"], "--run.setps (did you mean --run.steps?)"),
    (["--stps=5"], "--stps (did you mean --steps?)"),
    (["--trainer.warmup-steps", "5"], "--trainer.warmup-steps (did you mean --optimizer.warmup-steps?)"),
    (["--zzz"], "unknown option --zzz; --help lists them all"),
    (["--run"], "unknown option --run"),
    (["--steps"], "--steps: a value is missing"),
    (["--steps", "--resume"], "--steps: a value is missing"),
    (["--steps", "ten"], "--steps: expected int, got 'ten'"),
    (["--steps", "1.5"], "--steps: expected int, got '1.5'"),
    (["--optimizer.lr", "fast"], "--optimizer.lr: expected float, got 'fast'"),
    (["--dtype", "fp64"], "--dtype: 'fp64' is not one of fp32, bf16"),
    (["--run.device", "tpu"], "--run.device: 'tpu' is not one of auto, cpu, cuda"),
    (["--resume=perhaps"], "--resume: expected bool, got 'perhaps'"),
    (["--no-resume=true"], "--no-resume: takes no value; write --resume=true instead"),
    (["--steps", "5", "laptop"], "unexpected argument 'laptop'"),
    (["-x"], "unexpected argument '-x'"),
    (["no-such-recipe"], "no such recipe or file"),
    (["laptpo"], "(did you mean 'laptop'?)"),
    ([str(ROOT)], "cannot be read"),
    (["--steps", "0"], "run.steps must be at least 1, got 0"),
    (["--seed", "-1"], "run.seed must be in [0, 2**63), got -1"),
    (["--world-size", "0"], "run.world_size must be at least 1, got 0"),
    (["--checkpoint-every", "-1"], "run.checkpoint_every must be at least 0, got -1"),
    (["--run.keep-checkpoints", "0"], "run.keep_checkpoints must be at least 1"),
    (["--run.collective-timeout-s", "inf"], "run.collective_timeout_s must be a finite number above 0, got inf"),
    (["--optimizer.lr", "0"], "optimizer.lr must be a finite number above 0, got 0.0"),
    (["--optimizer.lr", "nan"], "optimizer.lr must be a finite number above 0, got nan"),
    (["--optimizer.beta2", "1"], "optimizer.beta2 must be in [0, 1), got 1.0"),
    (["--optimizer.clip-norm", "0"], "optimizer.clip_norm must be above 0"),
    (["--optimizer.min-lr-ratio", "1.1"], "optimizer.min_lr_ratio must be in [0, 1], got 1.1"),
    (["--plan.ahead", "0"], "plan.ahead must be at least 1"),
    (["--plan.device-budget", "lots"], "plan.device_budget: expected a quantity such as '80 GiB', got 'lots'"),
    (["--plan.device-budget", "0"], "plan.device_budget must be above 0 bytes"),
    (["--plan.cost", "no-such-file.yaml"], "plan.cost 'no-such-file.yaml': no such file"),
    (["--max-length", "0"], "data.max_length must be at least 1"),
    (["--max-length", "32768"], "data.tokens_per_step (8192) must be at least data.max_length (32768)"),
    (["--data", "no-such-folder"], "data.path 'no-such-folder': no such file or folder"),
    (["--data", "x" * 5000], "no such file or folder"),
    (["--data="], "data.path '': no such file or folder"),
    (["--tokenizer", "no-such.json"], "data.tokenizer 'no-such.json': no such file"),
    (["--run-dir", __file__], "is not a folder"),
    (["--run-dir="], "run.dir '' is not a folder"),
    (["--data.text-field="], "data.text_field must not be empty"),
    (["--tensor-parallel", "2", "--world-size", "5"], "parallel.tensor_parallel (2) must divide run.world_size (5)"),
    (["--tensor-parallel", "3", "--world-size", "6"], "must divide num_query_heads (4) and num_kv_heads (2) of"),
    (["--tensor-parallel", "4", "--world-size", "8"], "must divide num_kv_heads (2) of model tiny"),
    (["--tensor-parallel", "2", "--model.ffn-dim", "385"], "must divide ffn_dim (385) of model tiny"),
    (["--degree", "2"], "plan.degree is for plan.strategy static only, not adaptive"),
    (["--strategy", "static", "--degree", "5"], "plan.degree (5) must be at most 4"),
    (["--strategy", "static", "--degree", "0"], "plan.degree must be at least 1, got 0"),
    (["--strategy", "flexps"], "plan.strategy 'flexps' is unknown (did you mean 'flexsp'?)"),
    (["--strategy", "zepelin"], "plan.strategy 'zepelin' is unknown (did you mean 'zeppelin'?)"),
    (["--strategy", "megatron", "--degree", "2"], "plan.degree is for plan.strategy static only, not megatron"),
    (["--attention", "ulises"], "plan.attention 'ulises' is unknown (did you mean 'ulysses'?)"),
    (["--swap-fraction", "0.5"], "memory.swap_fraction is for memory.policy swap only, not auto"),
    (["--memory", "keep", "--tier", "disk"],
     "memory.tier is for memory.policy swap, seco, spaco and auto only, not keep"),
    (["--memory", "seco", "--chunk-tokens", "8", "--tier", "disk", "--pipeline-parallel", "2",
      "--model.tied-head", "false"],
     "memory.tier with memory.policy seco is not built yet for pipeline_parallel above 1"),
    (["--memory", "swap", "--tier", "dsk"], "memory.tier 'dsk' is unknown (did you mean 'disk'?)"),
    (["--memory", "swap", "--memory.tier-budget", "0"], "memory.tier_budget must be above 0 bytes, got '0'"),
    (["--memory", "swap", "--memory.tier-budget", "many"], "memory.tier_budget"),
    (["--memory", "swap", "--swap-fraction", "2"], "memory.swap_fraction must be in [0, 1], got 2.0"),
    (["--memory", "swap", "--model.num-layers", "2"],
     "memory.policy swap needs at least 3 layers, because the last 2 are always kept; tiny has 2"),
    (["--memory", "recompute", "--model.num-layers", "1"],
     "memory.policy recompute needs at least 2 layers, because the last one is always kept; tiny has 1"),
    (["--memory", "recompute", "--memory.tier-budget", "1 GiB"],
     "memory.tier_budget is for runs that use a tier, not memory.policy recompute without one: leave it out"),
    (["--memory", "seco", "--chunk-tokens", "8", "--memory.tier-budget", "1 GiB"],
     "memory.tier_budget is for runs that use a tier, not memory.policy seco without one: leave it out"),
    (["--tier", "disk", "--strategy", "flexsp"],
     "memory.tier: nothing would be swapped, because flexsp chooses no memory policies (adaptive: "),
    (["--memory.tier-budget", "1 GiB", "--strategy", "zeppelin"], "memory.tier_budget: nothing would be swapped"),
    (["--memory", "seco"], "memory.policy seco needs memory.chunk_tokens (--chunk-tokens N)"),
    (["--memory", "spaco", "--chunk-tokens", "64"], "memory.policy spaco needs memory.sample_fraction"),
    (["--memory", "spaco", "--chunk-tokens", "64", "--sample-fraction", "0"], "sample_fraction must be in (0, 1]"),
    (["--memory", "seco", "--chunk-tokens", "0"], "memory.chunk_tokens must be at least 1, got 0"),
    (["--chunk-tokens", "64"], "memory.chunk_tokens is for memory.policy seco and spaco, not auto"),
    (["--memory", "seco", "--chunk-tokens", "64", "--sample-fraction", "0.5"], "memory.sample_fraction is for"),
    (["--memory", "seco", "--chunk-tokens", "64", "--memory.sampling", "importance"], "memory.sampling is for"),
    (["--memory.mlp-chunk-tokens", "-1"],
     "memory.mlp_chunk_tokens must be at least 1, or 0 for all tokens at once, got -1"),
    (["--memory.chunk-budget", "1 GiB"], "memory.chunk_budget is for memory.policy seco and spaco, not auto"),
    (["--memory.chunk-budget", "much"], "memory.chunk_budget: expected"),
    (["--memory", "seco", "--chunk-tokens", "64", "--pipeline-parallel", "2", "--memory.chunk-budget", "1 MiB"],
     "memory.chunk_budget is for one pipeline stage"),
    (["--memory", "seco", "--chunk-tokens", "64", "--parallel.sharding", "zero3", "--memory.chunk-budget", "1 MiB"],
     "memory.chunk_budget is for one pipeline stage and sharding gather_once only"),
    (["--model", "mixtral-8x7b"], "model.preset (mixtral-8x7b) can be planned but not trained"),
    (["--model", "gpt-7b"], "model.preset (gpt-7b) can be planned but not trained: training builds dense"),
    (["--pipeline-parallel", "3"], "parallel.tensor_parallel (1) x parallel.pipeline_parallel (3) must divide "
     "run.world_size (4)"),
    (["--pipeline-parallel", "2", "--model.num-layers", "1"], "pipeline_parallel (2) is more than the 1 layers"),
    (["--pipeline-parallel", "2", "--model.tied-head", "true"], "on different stages; use --model.tied-head false"),
    (["--parallel.gradient-dtype", "bf16"], "parallel.gradient_dtype bf16 needs run.dtype bf16"),
    (["--parallel.sharding", "zero3", "--pipeline-parallel", "2"], "cannot be used with pipeline_parallel above 1"),
    (["--parallel.shard-ranks", "3"], "parallel.shard_ranks (3) must divide the 4 data ranks"),
    (["--parallel.shard-ranks", "0"], "parallel.shard_ranks must be at least 1"),
    (["--model", "tinny"], "unknown model 'tinny' (did you mean 'tiny'?)"),
    (["--model.num-kv-heads", "3"], "num_query_heads (4) must be a multiple of num_kv_heads (3)"),
    (["--model.head-dim", "15"], "head_dim (15) must be even"),
    (["--model.num-layers", "0"], "num_layers must be at least 1"),
    (["--model.rope-theta", "-1"], "model.rope_theta must be a finite number above 0"),
]


def test_a_cost_for_other_stages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cost.yaml"
    cost = derive_cost(load_cluster("laptop-cpu"), load_model("tiny"), num_ranks=2, num_stages=2)
    path.write_text(yaml.safe_dump(to_plain(cost)))
    config = resolve_config(["--plan.cost", str(path), "--pipeline-parallel", "2"])
    assert load_run_cost(config) == cost
    with pytest.raises(SpecError, match="priced for 2 pipeline stages, this run has 1: set --pipeline-parallel"):
        load_run_cost(resolve_config(["--plan.cost", str(path)]))


@pytest.mark.parametrize(("arguments", "expected"), BAD_FLAGS, ids=[" ".join(words)[:40] for words, _ in BAD_FLAGS])
def test_bad_flags_give_one_clear_line(arguments: list[str], expected: str) -> None:
    lines = refusal(arguments)
    assert len(lines) == 1 and expected in lines[0]


def test_ulysses_cannot_split_more_ranks_than_heads() -> None:
    few_heads = ["--model.num-query-heads", "2", "--model.num-kv-heads", "2"]
    arguments = ["--strategy", "static", "--degree", "4", "--attention", "ulysses", *few_heads]
    assert "plan.degree (4) is more than the 2 query heads" in refusal(arguments)[0]
    arguments[5] = "ring"
    assert resolve_config(arguments).plan.degree == 4


def test_all_mistakes_are_said_at_once() -> None:
    assert len(refusal(["--stps", "1", "--seed", "x", "foo"])) == 3
    assert len(refusal(["--steps", "0", "--strategy", "hpd", "--data", "nowhere"])) == 3


BAD_RECIPES = [
    ("run: {setps: 5}", "unknown key 'setps' (did you mean 'steps'?)"),
    ("rnu: {steps: 5}", "unknown key 'rnu' (did you mean 'run'?)"),
    ("run: {steps: many}", "run.steps: expected int, got 'many'"),
    ("run: {steps: true}", "run.steps: expected int, got True"),
    ("run: {dtype: fp8}", "run.dtype: 'fp8' is not one of fp32, bf16"),
    ("run: {resume: 1}", "run.resume: expected bool, got 1"),
    ("run: [1, 2]", "expected a mapping of RunConfig keys"),
    ("- run", "expected a mapping of TrainConfig keys"),
    ("run: {steps: 5", "not valid YAML"),
    ("run: {steps: 5, steps: 6}", "key 'steps' appears twice"),
    ("run: {steps: 5}\nrun: {seed: 6}", "line 2: not valid YAML (key 'run' appears twice)"),
    ("run: !!python/object/apply:os.system [exit]", "not valid YAML"),
    ("run: {seed: 2020-99-99}", "not valid YAML"),
    ("run:\n  ? [a]\n  : 1", "line 2: not valid YAML (found unhashable key)"),
    ("5: 1", "unknown key 5"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_RECIPES)
def test_bad_recipes_name_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    recipe = write(tmp_path, text)
    lines = refusal([recipe])
    assert len(lines) == 1 and lines[0].startswith(recipe) and expected in lines[0]


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal([str(tmp_path / "recipe.yaml")])[0]
    assert "not valid YAML" in refusal([write(tmp_path, "run: \0")])[0]


def test_yaml_round_trip(tmp_path: Path) -> None:
    changed = TrainConfig(
        run=RunConfig(dir="a b: c", resume=True), data=DataConfig(path="\u00e9.jsonl"),
        optimizer=OptimizerConfig(lr=1e-5, eps=1e-12, clip_norm=float("inf")), model=ModelConfig(qk_norm=True),
    )
    for config in (TrainConfig(), changed):
        assert load_recipe(write(tmp_path, config_to_yaml(config))) == config


def test_model_spec_merges_preset_and_overrides() -> None:
    config = TrainConfig(model=ModelConfig(preset="tiny", num_layers=2, tied_head=True, rope_theta=5e5))
    expected = dataclasses.replace(
        load_model("tiny"), num_layers=2, tied_head=True, rope_theta=5e5, vocab_size=999
    )
    assert model_spec(config, 999) == expected


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve_config(["bench-skewed", "--print-config", "--steps", "3"])
    assert caught.value.code == 0
    data = yaml.safe_load(capsys.readouterr().out)
    assert (data["run"]["steps"], data["data"]["max_length"]) == (3, load_recipe("bench-skewed").data.max_length)


def test_help_names_every_field_and_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve_config(["bench-skewed", "--steps", "3", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(getattr(TrainConfig(), section.name)):
            assert f"--{section.name}.{field.name}".replace("_", "-") in text
    assert "Optimizer steps in all" in text and "bench-skewed" in text


def test_torch_is_not_needed_for_settings() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'megatron')))\n"
        "from trainer.settings.resolve import resolve_config; resolve_config([]); assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_layers_that_stay_are_those_of_the_executor() -> None:
    assert {
        "swap": ActivationPolicy(swap_fraction=0.5, keep_fraction=0.0).num_kept_layers,
        "recompute": RECOMPUTE_ALL.num_kept_layers,
    } == KEPT_LAYERS
