"""Cluster, model and lengths files: what is built in, and one clear line for every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from planner.codec import to_plain
from planner.cost.machine_profile import load_cost
from planner.errors import SpecError
from planner.inputs.files import cluster_names, load_cluster, load_model, model_names, sources
from planner.inputs.lengths_file import batches_of_sequences, batches_of_tokens, drop_longer, read_lengths
from planner.units import GIB
from tests.planner.pricing.test_simulate import second_cost


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def refusal(load: object, *arguments: object) -> str:
    with pytest.raises(SpecError) as refused:
        load(*arguments)  # type: ignore[operator]
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "num_ranks"), [
    ("a100-40g-64", 64), ("a800-8", 8), ("bytescale-1024", 1024), ("h100-8", 8), ("h100-1024", 1024),
    ("h100-12288", 12288), ("h200-8", 8), ("h200-64", 64), ("laptop-cpu", 4), ("zeppelin-a", 16),
])
def test_built_in_clusters(name: str, num_ranks: int) -> None:
    assert name in cluster_names()
    cluster = load_cluster(name)
    assert cluster.name == name
    for part in (cluster.device, cluster.host, cluster.intra_node, cluster.inter_node):
        assert part.source, "every number says where it comes from"
    assert cluster.num_ranks == num_ranks


def test_every_built_in_file_loads() -> None:
    for name in cluster_names():
        assert load_cluster(name).name == name
    for name in model_names():
        assert load_model(name).name == name and load_model(name).source


# Parameter counts of the published checkpoints, or what FlexSP's shapes give at a 384K context. Qwen2.5 has 129,024
# parameters more: its biases.
@pytest.mark.parametrize(("name", "num_params", "relative"), [
    ("llama-7b", 6_738_415_616, 0), ("llama-3-8b", 8_030_261_248, 0), ("qwen3-8b", 8_190_735_360, 0),
    ("llama-13b", 13_015_864_320, 0), ("llama-30b", 32_528_943_616, 0), ("llama-70b", 68_976_648_192, 0),
    ("llama-3-70b", 70_553_706_496, 0), ("qwen2.5-7b", 7_615_616_512 - 129_024, 0), ("qwen3-32b", 32_762_123_264, 0),
    ("mixtral-8x7b", 46_702_792_704, 0), ("mixtral-8x22b", 140_620_634_112, 0),
    ("gpt-7b", 8.43e9, 1e-3), ("gpt-13b", 15.07e9, 1e-3), ("gpt-30b", 35.13e9, 1e-3), ("tiny", 853_376, 0),
])
def test_built_in_models_have_their_published_size(name: str, num_params: float, relative: float) -> None:
    assert name in model_names()
    model = load_model(name)
    assert model.name == name and model.source
    assert model.num_params == pytest.approx(num_params, rel=relative, abs=0)


@pytest.mark.parametrize(("name", "num_active"), [("mixtral-8x7b", 12.88e9), ("mixtral-8x22b", 39.15e9)])
def test_a_mixture_computes_with_its_active_experts_only(name: str, num_active: float) -> None:
    model = load_model(name)
    assert model.num_active_params == pytest.approx(num_active, rel=1e-3)
    table = model.vocab_size * model.hidden_dim  # the input embedding is looked up, not multiplied
    norms = (2 * model.num_layers + 1) * model.hidden_dim
    assert model.linear_flop(10) == 60 * (model.num_active_params - table - norms)
    dense = replace(model, num_experts=1, active_experts=1)
    assert dense.num_params == dense.num_active_params < model.num_active_params
    assert dense.saved_bytes_per_token(2) < model.saved_bytes_per_token(2) < 2 * dense.saved_bytes_per_token(2)
    assert dense.attention_flop([7]) == model.attention_flop([7])
    with pytest.raises(SpecError, match=r"active_experts \(9\) must be at least 1 and at most num_experts \(8\)"):
        replace(model, active_experts=9)


def test_units_are_converted_and_plain_numbers_kept() -> None:
    cluster = load_cluster("a100-40g-64")
    assert cluster.device.memory_bytes == 40 * GIB
    assert cluster.device.peak_flop_per_s == 312e12
    assert cluster.inter_node.bytes_per_s == 4.5e9 and cluster.inter_node.latency_s == 30e-6


TINY = "model tiny of 853K parameters"


def test_every_number_has_a_source_and_guesses_say_so() -> None:
    for name in model_names():
        assert load_model(name).source, name
    for name in cluster_names():
        cluster = load_cluster(name)
        assert all(part.source for part in (cluster.device, cluster.host, cluster.intra_node, cluster.inter_node)), name
    experts = dict(sources(load_cluster("h200-8"), load_model("mixtral-8x7b")))
    assert "model mixtral-8x7b of 46.7B parameters, 12.9B active" in experts
    parts = dict(sources(load_cluster("laptop-cpu"), load_model("tiny")))
    assert set(parts) == {"device CPU process", "host", "intra-node link", "inter-node link", TINY}
    assert {part for part, source in parts.items() if source == "guess"} == set(parts) - {TINY}
    hidden = dict(sources(load_cluster("bytescale-1024"), load_model("llama-7b")))
    assert hidden["device unpublished (A100-SXM4-80GB assumed)"].startswith("guess")


def test_a_measured_cost_file(tmp_path: Path) -> None:
    cost = second_cost()
    alone = write(tmp_path, yaml.safe_dump(to_plain(cost)))
    assert load_cost(alone) == cost
    machine = {"name": "box", "device": "cpu", "num_ranks": 4, "samples": [], "cost": to_plain(cost)}
    assert load_cost(write(tmp_path, yaml.safe_dump(machine))) == cost
    assert "cannot be read" in refusal(load_cost, str(tmp_path / "none.yaml"))
    bare = write(tmp_path, "memory: {fixed_bytes: 1, bytes_per_token: 1}")
    assert "missing keys 'times', 'step_fixed_s', 'peak_flop_per_s', 'provenance'" in refusal(load_cost, bare)
    assert "not valid YAML" in refusal(load_cost, write(tmp_path, "cost: [1, 2\n"))


def test_a_cluster_file_of_ones_own(tmp_path: Path) -> None:
    plain = to_plain(load_cluster("h200-8"))
    plain["name"], plain["num_nodes"], plain["device"]["memory_bytes"] = "ours", 3, "96 GB"
    cluster = load_cluster(write(tmp_path, yaml.safe_dump(plain)))
    assert cluster.num_ranks == 24 and cluster.device.memory_bytes == 96 * 10**9
    assert cluster.node_of(23) == 2


def test_unknown_names_and_missing_files_suggest() -> None:
    assert "unknown cluster 'h20-8' (did you mean 'h200-8'?)" in refusal(load_cluster, "h20-8")
    assert "unknown model 'lama-3-8b' (did you mean 'llama-3-8b'?)" in refusal(load_model, "lama-3-8b")
    assert "known: " in refusal(load_model, "zzz")
    message = refusal(load_cluster, "nowhere/c.yaml")
    assert "nowhere/c.yaml does not exist" in message and "h100-8" in message


def test_mistakes_in_files_name_file_and_place(tmp_path: Path) -> None:
    good = to_plain(load_model("tiny"))
    path = write(tmp_path, yaml.safe_dump({**good, "num_layer": 2}))
    assert f"model {path}: unknown key 'num_layer' (did you mean 'num_layers'?)" in refusal(load_model, path)
    path = write(tmp_path, yaml.safe_dump({key: good[key] for key in good if key != "head_dim"}))
    assert "missing key 'head_dim'" in refusal(load_model, path)
    path = write(tmp_path, yaml.safe_dump({**good, "num_kv_heads": 3}))
    assert "num_query_heads (4) must be a multiple of num_kv_heads (3)" in refusal(load_model, path)
    path = write(tmp_path, yaml.safe_dump({**good, "num_layers": "many"}))
    assert f"model {path}.num_layers: expected int, got 'many'" in refusal(load_model, path)
    path = write(tmp_path, "name: x\nnum_layers: [1, 2\nhidden: 3\n")
    assert "line 3" in refusal(load_model, path) and path in refusal(load_model, path)
    assert "expected a mapping" in refusal(load_model, write(tmp_path, "- 1\n"))
    assert "expected a mapping" in refusal(load_model, write(tmp_path, ""))
    assert "not valid YAML" in refusal(load_model, write(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(load_model, str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(("part", "key", "value", "words"), [
    ("device", "memory_bytes", "40 giraffes", "expected a quantity such as '80 GiB'"),
    ("device", "peak_flop_per_s", 0, "peak_flop_per_s must be a positive number"),
    ("device", "memory_bytes", "1 GiB", "memory_bytes must exceed reserved_bytes"),
    ("device", "linear_efficiency", 1.2, "linear_efficiency must be in (0, 1]"),
    ("intra_node", "bytes_per_s", -1, "bytes_per_s must be a positive number"),
    ("inter_node", "latency_s", float("nan"), "latency_s must be 0 or more"),
    ("host", "copy_bytes_per_s", float("inf"), "copy_bytes_per_s must be a positive number"),
])
def test_impossible_machines(tmp_path: Path, part: str, key: str, value: object, words: str) -> None:
    plain = to_plain(load_cluster("h200-8"))
    plain[part][key] = value
    message = refusal(load_cluster, write(tmp_path, yaml.safe_dump(plain)))
    assert words in message and part in message


def test_lengths_are_read_in_order(tmp_path: Path) -> None:
    assert read_lengths(write(tmp_path, "3\n 12 \n\n7\n")) == (3, 12, 7)
    assert read_lengths(write(tmp_path, "5\r\n6\r\n")) == (5, 6)


@pytest.mark.parametrize(("text", "words"), [
    ("3\n-4\n", "line 2: '-4' is not a number of tokens"), ("0\n", "line 1: a sequence has at least 1 token, got 0"),
    ("1\n\n2.5\n", "line 3: '2.5'"), ("12 13\n", "line 1: '12 13'"), ("1_0\n", "line 1"), ("\u0663\n", "line 1"),
    ("9" * 20, "line 1"), ("abc", "line 1: 'abc'"), ("", "holds no lengths"), ("\n \n", "holds no lengths"),
])
def test_bad_lengths_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text, "lengths.txt")
    message = refusal(read_lengths, path)
    assert path in message and words in message


def test_unreadable_lengths_file(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(read_lengths, str(tmp_path / "none.txt"))
    assert "cannot be read (Is a directory)" in refusal(read_lengths, str(tmp_path))


def test_batches_are_consecutive_and_lose_nothing() -> None:
    lengths = (5, 3, 9, 1, 1, 20, 2)
    assert list(batches_of_sequences(lengths, 3)) == [(5, 3, 9), (1, 1, 20), (2,)]
    assert list(batches_of_tokens(lengths, 10)) == [(5, 3), (9, 1), (1,), (20,), (2,)]


def test_longer_sequences_are_dropped_and_counted() -> None:
    assert drop_longer((5, 3, 9), 5) == ((5, 3), 1)
    assert "the shortest has 3 tokens" in refusal(drop_longer, (5, 3, 9), 2)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = write(tmp_path, "num_layers: 3\nnum_layers: 4\n")
    assert "line 2: not valid YAML (key 'num_layers' appears twice)" in refusal(load_model, twice)
