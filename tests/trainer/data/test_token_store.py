"""The token store: built once, whole or not at all; samples that predict every token exactly once."""

import json
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import SpecError
from trainer.data import token_store
from trainer.data.token_store import TokenStore, build_sample_index, open_store, unigram_entropy_nats
from trainer.settings.tree import DataConfig


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("hello", "", "h\u00e9", "x" * 5000)))
    return path


def open_at(corpus: Path, cache: Path, **settings: object) -> TokenStore:
    return open_store(DataConfig(path=str(corpus), **settings), cache)


def test_documents_come_back(corpus: Path, tmp_path: Path) -> None:
    store = open_at(corpus, tmp_path / "cache" / "deep")
    expected = [[*text.encode(), 256] for text in ("hello", "h\u00e9", "x" * 5000)]
    assert [store.document(index).tolist() for index in range(store.num_documents)] == expected
    assert store.lengths.tolist() == [6, 4, 5001]
    assert (store.num_tokens, store.vocab_size, store.meta.eod_id) == (5011, 257, 256)
    assert store.meta.skipped == {"empty documents": 1}
    assert store.read(0, 1, 3).tolist() == list(b"el") and store.read(2, 5000, 5001).tolist() == [256]
    assert any("3 documents, 5,011 tokens" in line for line in store.describe())
    for wrong in ((3, 0, 1), (-1, 0, 1), (0, 0, 7), (0, -1, 2), (0, 3, 2)):
        with pytest.raises(IndexError):
            store.read(*wrong)


def test_flushing_in_parts_changes_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_at(corpus, tmp_path / "whole")
    monkeypatch.setattr(token_store, "_FLUSH_TOKENS", 3)
    parts = open_at(corpus, tmp_path / "parts")
    assert parts.meta == whole.meta
    assert (parts.folder / "tokens.npy").read_bytes() == (whole.folder / "tokens.npy").read_bytes()


def test_store_is_reused_until_something_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_at(corpus, tmp_path / "cache")
    monkeypatch.setattr(token_store, "read_documents", lambda *_: pytest.fail("tokenised again"))
    assert open_at(corpus, tmp_path / "cache").folder == first.folder
    assert open_at(corpus, tmp_path / "unused", cache_dir=str(tmp_path / "cache")).folder == first.folder
    assert not (tmp_path / "unused").exists()
    monkeypatch.undo()
    with corpus.open("a") as file:
        file.write('{"text": "more"}\n')
    changed = open_at(corpus, tmp_path / "cache")
    assert changed.folder != first.folder and changed.num_documents == 4
    assert first.document(0).tolist() == [*b"hello", 256]  # a run that has it open is not disturbed
    corpus.write_text(corpus.read_text().replace("hello", "jello"))  # same size
    os.utime(corpus, ns=(1, 1))
    assert open_at(corpus, tmp_path / "cache").document(0).tolist() == [*b"jello", 256]
    with pytest.raises(SpecError, match="no key 'body'"):  # the text field is part of the identity
        open_at(corpus, tmp_path / "cache", text_field="body")


def test_failed_build_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    with corpus.open("a") as file:
        file.write("not json\n")
    for _ in range(2):
        with pytest.raises(SpecError, match=r"corpus\.jsonl:5"):
            open_at(corpus, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(SpecError, match=r"no document with text in 1 files \(1 empty documents\)"):
        open_at(tmp_path / "a.jsonl", tmp_path / "cache")


def test_cache_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="token cache .* cannot be written"):
        open_at(corpus, corpus)  # a file where the folder should be


def build_and_report(corpus: str, cache: str, start: object, results: object) -> None:
    start.wait()
    store = open_store(DataConfig(path=corpus), Path(cache))
    results.put((store.folder.name, store.num_tokens))


def test_builders_at_once_end_with_one_whole_store(corpus: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    arguments = (str(corpus), str(tmp_path / "cache"), start, results)
    processes = [context.Process(target=build_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(seen) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [next(iter(seen))[0]]


def test_second_builder_takes_the_first_ones_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, first = token_store._write_tokens, []

    def overtaken(*arguments: object) -> object:
        if not first:
            first.append(None)
            first[0] = open_at(corpus, tmp_path / "cache").folder
        return write(*arguments)

    monkeypatch.setattr(token_store, "_write_tokens", overtaken)
    assert open_at(corpus, tmp_path / "cache").folder == first[0]
    assert list((tmp_path / "cache").iterdir()) == [first[0]]


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "meta.json"])
def test_damaged_store_is_named(corpus: Path, tmp_path: Path, name: str) -> None:
    file = open_at(corpus, tmp_path / "cache").folder / name
    content = file.read_bytes()
    for damaged in (content[:-3], content[: len(content) // 2], b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(SpecError, match=rf"{name}: .*delete .*build it again"):
            open_at(corpus, tmp_path / "cache")
        file.write_bytes(content)
    assert open_at(corpus, tmp_path / "cache").num_documents == 3


def test_foreign_files_in_a_store(corpus: Path, tmp_path: Path) -> None:
    folder = open_at(corpus, tmp_path / "cache").folder
    meta = json.loads((folder / "meta.json").read_text())
    for change, expected in (
        ({"schema": 2}, "not a token store of version 1"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"num_tokens": 5010}, "does not belong to these tokens"),
    ):
        (folder / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(SpecError, match=expected):
            TokenStore(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    tokens = np.load(folder / "tokens.npy")
    tokens[2] = 60000
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(SpecError, match="document 0 holds an id outside the vocabulary of 257"):
        TokenStore(folder).read(0, 0, 5)


def test_store_as_a_corpus(corpus: Path, tmp_path: Path) -> None:
    built = open_at(corpus, tmp_path / "cache")
    direct = open_at(built.folder, tmp_path / "unused")
    assert direct.folder == built.folder and not (tmp_path / "unused").exists()
    (built.folder / "tokens.npy").unlink()
    with pytest.raises(SpecError, match=r"tokens\.npy"):
        open_at(built.folder, tmp_path / "unused")


def test_store_of_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    folder = open_at(corpus, tmp_path / "cache").folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "file-0"}))
    with pytest.raises(SpecError, match="tokenised with file-0, but data.tokenizer is bytes"):
        open_at(folder, tmp_path)


def test_token_arrays_become_a_store(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([1, 2, 256, 3], dtype=np.int64))
    np.save(tmp_path / "ids.offsets.npy", np.array([0, 3, 4]))
    store = open_at(tmp_path / "ids.npy", tmp_path / "cache")
    assert [store.document(index).tolist() for index in range(2)] == [[1, 2, 256], [3, 256]]  # no second end
    np.save(tmp_path / "ids.offsets.npy", np.array([0, 2, 4]))
    assert open_at(tmp_path / "ids.npy", tmp_path / "cache").lengths.tolist() == [3, 3]
    for wrong in (257, -1):
        np.save(tmp_path / "ids.npy", np.array([1, 2, wrong, 3]))
        with pytest.raises(SpecError, match=rf"ids\.npy\[1\]: holds token id {wrong}, but the tokenizer"):
            open_at(tmp_path / "ids.npy", tmp_path / "cache")


def test_large_vocabulary_needs_four_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{index}": index for index in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w69999 w5")
    store = open_at(tmp_path / "a.txt", tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert store.document(0).tolist() == [69999, 5, 70000]
    assert np.load(store.folder / "tokens.npy").dtype == np.uint32


def test_unigram_entropy(corpus: Path, tmp_path: Path) -> None:
    assert unigram_entropy_nats(np.array([0, 3, 0])) == 0.0
    assert unigram_entropy_nats(np.array([], dtype=np.int64)) == 0.0
    assert unigram_entropy_nats(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    store = open_at(corpus, tmp_path / "cache")
    counts = np.bincount(np.concatenate([store.document(index) for index in range(3)]))
    shares = counts[counts > 0] / counts.sum()
    assert store.meta.unigram_entropy_nats == pytest.approx(-sum(share * math.log(share) for share in shares))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_split_samples_predict_every_token_once(lengths: list[int], max_length: int) -> None:
    if max(lengths) < 2:
        with pytest.raises(SpecError, match="no sample is left"):
            build_sample_index(np.array(lengths), max_length=max_length, over_length="split")
        return
    index = build_sample_index(np.array(lengths), max_length=max_length, over_length="split")
    predicted = [
        (document, start + 1 + token)
        for document, start, size in zip(index.document, index.start, index.num_tokens, strict=True)
        for token in range(size)
    ]
    assert predicted == [(document, token) for document, size in enumerate(lengths) for token in range(1, size)]
    assert index.num_tokens.min() >= 1 and index.num_tokens.max() <= max_length
    assert index.num_short == sum(size < 2 for size in lengths)
    assert index.num_split == sum(size > max_length + 1 for size in lengths)
    assert len(index.describe()) == 1 + bool(index.num_split) + bool(index.num_short)


def test_dropped_documents_are_counted() -> None:
    index = build_sample_index(np.array([5, 6, 1, 0, 100]), max_length=4, over_length="drop")
    assert (index.document.tolist(), index.start.tolist(), index.num_tokens.tolist()) == ([0], [0], [4])
    assert (index.num_dropped, index.num_dropped_tokens, index.num_short, index.num_split) == (2, 106, 2, 0)
    assert "2 documents longer than that were dropped (106 tokens)" in index.describe()[1]
    with pytest.raises(SpecError, match="no sample is left"):
        build_sample_index(np.array([6, 100]), max_length=4, over_length="drop")


def test_boundary_of_the_length_limit() -> None:
    for size, pieces in ((5, [4]), (6, [4, 1]), (9, [4, 4]), (2, [1])):
        index = build_sample_index(np.array([size]), max_length=4, over_length="split")
        assert index.num_tokens.tolist() == pieces
