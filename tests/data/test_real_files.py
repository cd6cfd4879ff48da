"""Public data sets in the forms in which they come, where they lie beside the project."""

from pathlib import Path

import pytest

from fedsim.data.corpus import load_corpus
from fedsim.settings import DataSettings

TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"


def settings(train, test=None, **rest):
    for name in filter(None, (train, test)):
        if not (TEXT / name).is_file():
            pytest.skip(f"no {name} beside the project")
    return DataSettings(path=str(TEXT / train), test_path=str(TEXT / test) if test else None, quoting="none", **rest)


def test_sst2_small_without_header():
    chosen = settings("sst2_small/train.tsv", "sst2_small/dev.tsv", header=False, text=0, label=1)
    corpus = load_corpus(chosen, seed=0)
    assert (len(corpus.train), len(corpus.test), corpus.label_names) == (6920, 872, ("0", "1"))
    assert corpus.train.texts[0].startswith("a stirring , funny and finally transporting")
    assert corpus.train.labels[0] == 1


def test_sst2_with_another_text_column_in_the_test_file():
    chosen = settings("sst2/train.tsv.gz", "sst2/dev.tsv", text="sentence", test_text="content")
    corpus = load_corpus(chosen, seed=0)
    assert (len(corpus.train), len(corpus.test), corpus.label_names) == (67349, 872, ("0", "1"))


def test_agnews_with_string_labels():
    chosen = settings("agnews/train_10k.tsv.gz", "agnews/test.tsv.gz", header=False, text=0, label=1)
    corpus = load_corpus(chosen, seed=0)
    assert (len(corpus.train), len(corpus.test)) == (10001, 7600)
    assert corpus.label_names == ("Business", "Sci/Tech", "Sports", "World")


@pytest.mark.parametrize(
    ("file", "text", "pair", "rows", "labels"),
    [
        ("qnli_dev/dev.tsv.gz", "question", "sentence", 5463, ("entailment", "not_entailment")),
        ("mnli_dev/dev_matched.jsonl.gz", "premise", "hypothesis", 9815, ("contradiction", "entailment", "neutral")),
    ],
)
def test_pairs_with_a_held_out_fifth(file, text, pair, rows, labels):
    corpus = load_corpus(settings(file, text=text, pair=pair), seed=0)
    assert len(corpus.train) + len(corpus.test) == rows
    assert len(corpus.test) == pytest.approx(rows / 5, abs=3)
    assert corpus.label_names == labels
    assert corpus.train.pairs is not None
    assert len(corpus.train.pairs) == len(corpus.train)
