"""Prompts and responses from files: what the columns mean where ``data.task`` is ``causal_lm``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.corpus import load_corpus
from fedsim.data.fingerprint import corpus_hash
from fedsim.data.partition import partition
from fedsim.errors import DataError
from fedsim.settings import DataSettings

DOLLY = Path(__file__).resolve().parents[3] / "shared" / "data" / "text" / "dolly15k" / "dolly15k_clients10.jsonl.gz"
ROWS = [
    {"ask": f"what is {number}", "given": "" if number % 2 else f"{number} is one", "say": f"it is {number}", "kind": k}
    for number, k in enumerate(["open", "open", "list"] * 10)
]


def settings(path: Path, **changes) -> DataSettings:
    return DataSettings(**{"path": str(path), "task": "causal_lm", "text": "ask", "label": "say", **changes})


def write(folder: Path, rows=ROWS, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_columns_become_prompts_contexts_responses_and_categories(tmp_path):
    path = write(tmp_path)
    corpus = load_corpus(settings(path, pair="given", field="kind", test_path=str(path)), seed=0)
    assert corpus.label_names == ("list", "open")
    assert corpus.train.texts == tuple(row["ask"] for row in ROWS)
    assert corpus.train.pairs == tuple(row["given"] for row in ROWS)
    assert corpus.train.responses == corpus.test.responses == tuple(row["say"] for row in ROWS)
    assert [corpus.label_names[label] for label in corpus.train.labels] == [row["kind"] for row in ROWS]
    assert corpus.train.take(np.array([4, 2])).responses == ("it is 4", "it is 2")


def test_without_a_field_there_is_one_category_and_without_a_pair_no_context(tmp_path):
    corpus = load_corpus(settings(write(tmp_path)), seed=0)
    assert corpus.label_names == ("all",)
    assert corpus.train.pairs is None
    assert not corpus.train.labels.any()
    assert len(corpus.test) == 6
    assert {*corpus.train.responses, *corpus.test.responses} == {row["say"] for row in ROWS}
    parts = partition(corpus.train, settings(tmp_path / "a.jsonl", partition="dirichlet"), 4, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(24))


def test_a_category_of_the_test_file_alone_is_no_fault(tmp_path):
    test = write(tmp_path, [{**ROWS[0], "kind": "rare"}], "b.jsonl")
    corpus = load_corpus(settings(write(tmp_path), field="kind", test_path=str(test)), seed=0)
    assert corpus.label_names == ("list", "open", "rare")
    assert corpus.test.labels.tolist() == [2]


@pytest.mark.parametrize("context", ["", "  ", None])
def test_a_missing_context_is_an_empty_one(tmp_path, context):
    rows = [{**row, "given": context} for row in ROWS]
    assert set(load_corpus(settings(write(tmp_path, rows), pair="given"), seed=0).train.pairs) == {""}


def test_tables_with_columns_by_number(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{row['ask']}\t{row['given']}\t{row['say']}\n" for row in ROWS))
    corpus = load_corpus(settings(path, header=False, text=0, pair=1, label=2), seed=0)
    assert corpus.train.responses[0] == f"it is {corpus.train.texts[0].split()[-1]}"


def test_the_hash_covers_the_responses_and_nothing_new_of_classification(tmp_path):
    changed = [{**ROWS[0], "say": "no idea"}, *ROWS[1:]]
    paths = write(tmp_path), write(tmp_path, changed, "b.jsonl")
    hashes = [corpus_hash(load_corpus(settings(path, test_path=str(path)), seed=0)) for path in paths]
    assert hashes[0] != hashes[1]
    classes = load_corpus(DataSettings(path=str(paths[0]), text="ask", label="kind", test_path=str(paths[0])), seed=0)
    assert classes.train.responses is None


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({"label": "label"}, ROWS, ["line 1", "column data.label 'label' is not there", "ask, given, say, kind"]),
        ({}, [*ROWS, {"ask": "why"}], ["line 31", "data.label 'say'"]),
        ({}, [{**ROWS[0], "say": " "}], ["line 1", "data.label is empty, where text is needed"]),
        ({}, [{**ROWS[0], "say": None}], ["line 1", "data.label is None"]),
        ({}, [{**ROWS[0], "say": 3}], ["line 1", "data.label is 3, where text is needed"]),
        ({}, [{**ROWS[0], "ask": ""}], ["line 1", "data.text is empty"]),
        ({"pair": "given"}, [{**ROWS[0], "given": 3}], ["line 1", "data.pair is 3"]),
        ({"pair": "say"}, ROWS, ["data.pair and data.label are both 'say'", "columns of their own"]),
        ({"text": "say"}, ROWS, ["data.text and data.label are both 'say'"]),
        ({}, ROWS[:3], ["too few to hold out a fifth"]),
    ],
)
def test_unusable_columns_are_refused_in_one_sentence(tmp_path, changes, rows, words):
    with pytest.raises(DataError) as caught:
        load_corpus(settings(write(tmp_path, rows), **changes), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", [None, "synthetic"])
def test_the_built_in_text_has_no_responses(name):
    with pytest.raises(DataError, match=r"causal_lm' needs data.path.*'synthetic' has no responses"):
        load_corpus(DataSettings(name=name, task="causal_lm"), seed=0)


def test_dolly():
    if not DOLLY.is_file():
        pytest.skip("no dolly15k beside the project")
    chosen = settings(DOLLY, text="instruction", pair="context", label="response", field="category", partition="field")
    corpus = load_corpus(chosen, seed=0)
    assert (len(corpus.train) + len(corpus.test), len(corpus.label_names)) == (15011, 8)
    assert "closed_qa" in corpus.label_names
    parts = partition(corpus.train, chosen, 20, seed=0)
    assert all(len(set(corpus.train.labels[part])) == 1 for part in parts)


def test_the_built_in_sentences_can_be_completed():
    """Prompt and response together are the sentence; topics are the categories."""
    asked = DataSettings(name="completions", task="causal_lm", max_samples=50)
    corpus, whole = load_corpus(asked, 3), load_corpus(DataSettings(max_samples=50), 3)
    assert corpus.train.responses is not None
    joined = [f"{text} {rest}" for text, rest in zip(corpus.train.texts, corpus.train.responses, strict=True)]
    assert tuple(joined) == whole.train.texts
    assert [corpus.label_names[label] for label in corpus.train.labels] == list(whole.train.fields or ())
    assert all(corpus.train.texts)
    assert all(corpus.train.responses)
    with pytest.raises(DataError, match=r"'completions' holds prompts and responses: give data.task causal_lm"):
        load_corpus(DataSettings(name="completions"), 0)
