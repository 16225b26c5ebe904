"""Cluster, model and lengths files: what is built in, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from planner.codec import to_plain
from planner.errors import SpecError
from planner.lengths_file import batches_of_sequences, batches_of_tokens, drop_longer, read_lengths
from planner.specs import cluster_names, guesses, load_cluster, load_model, model_names
from planner.units import GIB


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


@pytest.mark.parametrize("name", ["a100-40g-64", "h100-8", "h200-8", "h200-64", "laptop-cpu"])
def test_built_in_clusters(name: str) -> None:
    assert name in cluster_names()
    cluster = load_cluster(name)
    assert cluster.name == name
    for part in (cluster.device, cluster.host, cluster.intra_node, cluster.inter_node):
        assert part.source, "every number says where it comes from"
    assert cluster.num_ranks == {"laptop-cpu": 4}.get(name, int(name.rsplit("-", 1)[-1]) if "cpu" not in name else 4)


# Parameter counts as published (Llama 2 7B, Llama 3 8B, Qwen3 8B) or as FlexSP's shapes give at a 384K context.
@pytest.mark.parametrize(("name", "num_params", "relative"), [
    ("llama-7b", 6_738_415_616, 0), ("llama-3-8b", 8_030_261_248, 0), ("qwen3-8b", 8_190_735_360, 0),
    ("gpt-7b", 8.43e9, 1e-3), ("gpt-13b", 15.07e9, 1e-3), ("gpt-30b", 35.13e9, 1e-3), ("tiny", 853_376, 0),
])
def test_built_in_models_have_their_published_size(name: str, num_params: float, relative: float) -> None:
    assert name in model_names()
    model = load_model(name)
    assert model.name == name and model.source
    assert model.num_params == pytest.approx(num_params, rel=relative, abs=0)


def test_units_are_converted_and_plain_numbers_kept() -> None:
    cluster = load_cluster("a100-40g-64")
    assert cluster.device.memory_bytes == 40 * GIB
    assert cluster.device.peak_flop_per_s == 312e12
    assert cluster.inter_node.bytes_per_s == 4.5e9 and cluster.inter_node.latency_s == 30e-6


def test_guesses_are_marked() -> None:
    assert guesses(load_cluster("laptop-cpu")) == ("device", "host", "intra-node link", "inter-node link")
    assert any(line.startswith("host: guess") for line in guesses(load_cluster("h200-8")))


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
