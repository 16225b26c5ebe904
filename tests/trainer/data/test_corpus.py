"""Documents and tokens: every source, every mistake named with its file and line."""

import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import SpecError
from trainer.data.corpus import find_corpus, read_documents
from trainer.data.histogram import length_histogram
from trainer.data.tokenizer import ByteTokenizer, load_tokenizer
from trainer.data.training_data import open_training_data
from trainer.settings.tree import TrainConfig


def read(path: Path | str, text_field: str = "text") -> tuple[list, Counter[str]]:
    skipped: Counter[str] = Counter()
    return list(read_documents(find_corpus(str(path), text_field=text_field), skipped)), skipped


def texts(path: Path | str) -> list[str]:
    return [document for _, document in read(path)[0]]


def lines_file(folder: Path, *lines: str, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


def word_tokenizer(folder: Path, *special: str) -> Path:
    model = tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_standard_library_is_real_long_tailed_text() -> None:
    source = find_corpus(None)
    sizes = np.array([file.stat().st_size for file in source.files])
    assert sizes.sum() > 5e6 and len(sizes) > 300
    assert sizes.max() > 20 * np.median(sizes)
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for file in source.files for part in file.relative_to(root).parts[:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def test_standard_library_is_not_cut_into_equal_pieces(tmp_path: Path) -> None:
    samples = open_training_data(TrainConfig(), tmp_path).samples
    assert samples.num_split == 0 and samples.num_dropped > 100
    assert len(samples) > 40 and samples.num_tokens.max() > 5 * np.quantile(samples.num_tokens, 0.25)


def test_standard_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "os.py").write_text("import sys")
    for folder in (tmp_path, tmp_path / "python311.zip"):
        monkeypatch.setattr(sysconfig, "get_paths", lambda folder=folder: {"stdlib": str(folder)})
        with pytest.raises(SpecError, match="not enough to train on; name a corpus with --data"):
            find_corpus(None)


def test_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"two", "a/z.md": "\u00e9".encode(), "a/a.py": b"\xef\xbb\xbfone", "c.bin": b"\xff\xfe\x00",
        "nul": b"a\x00b", "empty.txt": b"", ".hidden": b"x", ".git/config": b"x", "a/__pycache__/m.py": b"x",
        "stray.npy": b"not an array",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    lines_file(tmp_path, '{"text": "three"}', '{"text": "four"}', name="d.jsonl")
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    documents, skipped = read(tmp_path)
    assert [document for _, document in documents] == ["two", "three", "four", "one", "\u00e9"]
    assert documents[0][0] == str(tmp_path / "b.txt") and documents[2][0] == f"{tmp_path / 'd.jsonl'}:2"
    assert skipped == {"files that are not UTF-8 text": 3, "empty documents": 1}


def test_single_files_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "b.txt").write_text("two")
    assert texts(tmp_path / "a[1].txt") == ["one"]  # a file of that name comes before the pattern
    assert texts(tmp_path / "*.txt") == ["one", "two"]
    assert texts(tmp_path / "**" / "b.t?t") == ["two"]  # once, whatever links lead there


def test_jsonl(tmp_path: Path) -> None:
    path = lines_file(tmp_path, '\ufeff{"text": "a", "x": 1}', "", "  ", '{"text": ""}', '{"text": "\\ud800b"}', "")
    documents, skipped = read(path)
    assert documents == [(f"{path}:1", "a"), (f"{path}:5", "?b")]
    assert skipped == {"empty documents": 1, "documents with lone surrogates, replaced by '?'": 1}
    assert read(lines_file(tmp_path, '{"body": "b"}'), "body")[0][0][1] == "b"


@pytest.mark.parametrize(("line", "expected"), [
    ('{"text": "a"', "not a line of JSON"),
    ("text", "not a line of JSON"),
    ("[" * 100_000, "not a line of JSON"),
    ("\udcff", "not a line of JSON"),
    ('["text"]', "expected a JSON object with the key 'text', got list"),
    ('{"txet": "a"}', r"no key 'text' \(did you mean 'txet'\?\)"),
    ('{"text": 5}', "'text' must be text, got int"),
    ('{"text": null}', "'text' must be text, got NoneType"),
])
def test_bad_jsonl_line_names_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = lines_file(tmp_path, '{"text": "fine"}', line, '{"text": "fine"}')
    with pytest.raises(SpecError, match=rf"a\.jsonl:2: {expected}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_corpora_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "image.png").write_bytes(b"a\x00b")
    os.mkfifo(tmp_path / "pipe")
    for path, expected in {
        tmp_path / "nowhere": "no such file or folder",
        tmp_path / "*.none": "no file matches it as a pattern",
        tmp_path / "empty": "the folder holds no visible file",
        tmp_path / "latin.txt": r"latin.txt: not UTF-8 text \(byte 3\)",
        tmp_path / "image.png": "image.png: a binary file",
        tmp_path / "pipe": "neither a regular file nor a folder",
        "x" * 5000: "cannot be read",
        "\0": "no such file or folder",
    }.items():
        with pytest.raises(SpecError, match=expected):
            read(path)


def test_file_that_vanishes_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    source = find_corpus(str(lines_file(tmp_path, '{"text": "a"}')))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SpecError, match=r"a\.jsonl: cannot be read \(No such file"):
        list(read_documents(source, Counter()))


def save_arrays(folder: Path, ids: np.ndarray, offsets: np.ndarray | None) -> Path:
    np.save(folder / "ids.npy", ids)
    if offsets is not None:
        np.save(folder / "ids.offsets.npy", offsets)
    return folder / "ids.npy"


def test_token_arrays(tmp_path: Path) -> None:
    path = save_arrays(tmp_path, np.arange(5, dtype=np.int32), np.array([0, 2, 2, 5]))
    for where in (path, tmp_path):
        documents, skipped = read(where)
        assert [(name, ids.tolist()) for name, ids in documents] == [(f"{path}[0]", [0, 1]), (f"{path}[2]", [2, 3, 4])]
        assert skipped == {"empty documents": 1}


@pytest.mark.parametrize(("ids", "offsets", "expected"), [
    (np.arange(5), None, "need ids.offsets.npy beside them"),
    (np.arange(5), np.array([0, 6]), "the last offset is 6, but there are 5"),
    (np.arange(5), np.array([1, 5]), "the first offset must be 0"),
    (np.arange(5), np.array([], dtype=np.int64), "the first offset must be 0|not a whole"),
    (np.arange(5), np.array([0, 4, 3, 5]), "must not decrease"),
    (np.arange(5), np.array([0, -1, 5]), "must not decrease"),
    (np.arange(5.0), np.array([0, 5]), "expected one row of integers"),
    (np.zeros((2, 2), dtype=np.int64), np.array([0, 2]), "expected one row of integers"),
    (np.array([print], dtype=object), np.array([0, 1]), "not a whole .npy file"),
])
def test_bad_token_arrays(tmp_path: Path, ids: np.ndarray, offsets: np.ndarray | None, expected: str) -> None:
    path = save_arrays(tmp_path, ids, offsets)
    with pytest.raises(SpecError, match=expected):
        read(path)


def test_cut_token_array(tmp_path: Path) -> None:
    path = save_arrays(tmp_path, np.arange(1000), np.array([0, 1000]))
    content = path.read_bytes()
    for size in (0, 10, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(SpecError, match=r"ids\.npy: not a whole \.npy file"):
            read(path)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()).decode() == text
    assert tokenizer.vocab_size == 257 and tokenizer.eod_id == 256


def test_tokenizer_file(tmp_path: Path) -> None:
    plain = load_tokenizer(str(word_tokenizer(tmp_path)))
    assert plain.encode("one two nine one").tolist() == [1, 2, 0, 1]  # the file's own truncation is off
    assert (plain.eod_id, plain.vocab_size) == (3, 4)
    with_end = load_tokenizer(str(word_tokenizer(tmp_path, "<pad>", "</s>")))
    assert (with_end.eod_id, with_end.vocab_size) == (4, 5)
    assert with_end.name != plain.name


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_bad_tokenizer_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(SpecError, match=r"t\.json: not a file of the tokenizers library"):
        load_tokenizer(str(tmp_path / "t.json"))
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(SpecError, match="cannot be read"):
            load_tokenizer(str(path))


def test_tokenizer_without_tokens(tmp_path: Path) -> None:
    file = word_tokenizer(tmp_path)
    data = json.loads(file.read_text())
    data["model"]["vocab"], data["added_tokens"] = {}, []
    file.write_text(json.dumps(data))
    with pytest.raises(SpecError, match="it has no tokens"):
        load_tokenizer(str(file))


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=50))
def test_histogram_counts_every_sample_once(sizes: list[int]) -> None:
    lines = length_histogram(np.array(sizes))
    rows = [line.split() for line in lines[1:-1]]
    assert sum(int(row[3].replace(",", "")) for row in rows) == len(sizes)
    assert abs(sum(float(row[4].rstrip("%")) for row in rows) - 100) < 0.06 * len(rows)
    assert f"longest {max(sizes):,}" in lines[-1]


def test_histogram_bins() -> None:
    lines = length_histogram(np.array([1, 1023, 1024, 1024, 2**20]), width=10)
    shown = {line.split("  ")[0].strip(): line for line in (" ".join([line]).lstrip() for line in lines)}
    assert shown["1 - 2"].endswith("#####") and shown["512 - 1K"].endswith("#####")
    assert shown["1K - 2K"].endswith(" " + 10 * "#") and "1M - 2M" in shown
    assert length_histogram(np.array([], dtype=np.int64)) == ["no samples"]
