"""What other people's files do: each is read rightly, or one sentence says what is wrong or lost."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.corpus import load_corpus
from fedsim.data.delimited import delimited_rows
from fedsim.data.labels import check_classes, label_text, without_gold
from fedsim.data.source import Source
from fedsim.errors import DataError
from fedsim.settings import DataSettings


def corpus_of(folder, name, content, /, **keys):
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    return load_corpus(DataSettings(path=str(path), **keys), seed=0)


def texts_of(corpus):
    return sorted([*corpus.train.texts, *corpus.test.texts])


def said(corpus, pattern):
    return any(re.search(pattern, note) for note in corpus.notes)


@pytest.mark.parametrize("none", ["-", "-1", ""])
@pytest.mark.parametrize("others", [("entailment", "neutral", "contradiction"), ("0", "1", "2")])
def test_rows_without_a_gold_label_are_no_class(tmp_path, none, others):
    rows = [f"premise {i}\t{none if i % 10 == 9 else others[i % 3]}" for i in range(60)]
    corpus = corpus_of(tmp_path, "nli.tsv", "text\tlabel\n" + "\n".join(rows) + "\n")
    assert corpus.label_names == tuple(sorted(others))
    assert len(corpus.train) + len(corpus.test) == 54
    assert said(corpus, r"6 of 60 rows have no gold label.*line 11")


def test_null_labels_of_json_are_no_class_and_a_file_of_them_is_refused(tmp_path):
    rows = [{"text": f"t {i}", "label": None if i % 4 == 0 else i % 2} for i in range(40)]
    corpus = corpus_of(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert corpus.label_names == ("0", "1")
    assert said(corpus, "10 of 40 rows have no gold label")
    with pytest.raises(DataError, match="none of the 3 rows has a gold label"):
        corpus_of(tmp_path, "b.tsv", "text\tlabel\na\t-1\nb\t-1\nc\t-1\n".replace("-1", "-"))


@pytest.mark.parametrize("scale", [("-1", "0", "1"), ("-1", "1"), ("-2", "-1", "0", "1", "2")])
def test_minus_one_on_a_scale_stays_a_class_and_is_named(tmp_path, scale):
    rows = "".join(f"t {i}\t{scale[i % len(scale)]}\n" for i in range(50))
    corpus = corpus_of(tmp_path, "a.tsv", "text\tlabel\n" + rows)
    assert corpus.label_names == scale
    assert said(corpus, "label -1 .* is taken as a class")


def test_labels_as_truth_values_and_as_numbers_with_a_point(tmp_path):
    rows = [{"text": f"t {i}", "label": i % 2 == 0} for i in range(20)]
    assert corpus_of(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))).label_names == ("false", "true")
    assert corpus_of(tmp_path, "a.tsv", "text\tlabel\n" + "a\t1.0\nb\t0.0\n" * 10).label_names == ("0", "1")
    test = tmp_path / "test.tsv"
    test.write_text("text\tlabel\nc\t1\n")
    corpus = corpus_of(tmp_path, "b.tsv", "text\tlabel\na\t1.0\nb\t0.0\n", test_path=str(test))
    assert corpus.test.labels.tolist() == [1]
    assert [label_text(value) for value in (True, 1.0, 0.5, "2.", float("nan"), None, " - ")] == [
        "true",
        "1",
        "0.5",
        "2",
        None,
        None,
        None,
    ]


@given(st.lists(st.sampled_from(["-1", "0", "1", "2", "yes", None]), min_size=1))
def test_no_class_is_lost_but_minus_one(labels):
    assert without_gold(labels) <= {"-1"}


def test_scores_and_row_names_are_no_classes(tmp_path):
    scores = "".join(f"t {i}\t{i % 150 * 5 / 150:.3f}\n" for i in range(300))
    with pytest.raises(DataError, match=r"150 distinct real numbers in 300 rows"):
        corpus_of(tmp_path, "a.tsv", "text\tlabel\n" + scores)
    names = "".join(f"t {i}\tid{i}\n" for i in range(300))
    with pytest.raises(DataError, match="300 distinct values in 300 rows, which look like names of rows"):
        corpus_of(tmp_path, "b.tsv", "text\tlabel\n" + names)
    many = "".join(f"t {i}\tintent{i % 77}\n" for i in range(1540))
    assert said(corpus_of(tmp_path, "c.tsv", "text\tlabel\n" + many), "77 distinct values in 1540 rows")
    assert check_classes(["0.5", "1", "1.5", "2"] * 3, "x") == [
        "x: data.label holds real numbers; each of the 4 becomes a class"
    ]
    assert check_classes(["a", "b"] * 10, "x") == []


@pytest.mark.parametrize("wanted", [20, 25, 40, 79])
def test_max_samples_leaves_every_class_a_training_row(tmp_path, wanted):
    rows = "".join(f"t {i}\tc{i % 20}\n" for i in range(100))
    corpus = corpus_of(tmp_path, "a.tsv", "text\tlabel\n" + rows, max_samples=wanted)
    assert len(corpus.train) == wanted
    assert len(set(corpus.train.texts)) == wanted
    assert np.unique(corpus.train.labels).tolist() == list(range(20))
    numbers = [int(text.split()[1]) for text in corpus.train.texts]
    assert numbers == sorted(numbers)


def test_max_samples_below_the_number_of_classes_is_refused(tmp_path):
    rows = "".join(f"t {i}\tc{i % 20}\n" for i in range(100))
    with pytest.raises(DataError, match=r"max_samples: value 6 .* 20 classes"):
        corpus_of(tmp_path, "a.tsv", "text\tlabel\n" + rows, max_samples=6)


def test_an_open_quote_in_a_tsv_swallows_nothing(tmp_path):
    rows = [f'"sentence {i} begins' if i in (3, 17) else f"sentence {i}" for i in range(30)]
    text = "text\tlabel\n" + "".join(f"{row}\t{i % 2}\n" for i, row in enumerate(rows))
    corpus = corpus_of(tmp_path, "a.tsv", text)
    assert texts_of(corpus) == sorted(rows)
    swallowed = corpus_of(
        tmp_path, "b.tsv", text.replace('"sentence 17 begins', 'sentence 17 ends"'), quoting="minimal", header=True
    )
    assert len(texts_of(swallowed)) < 30
    assert said(swallowed, r"line 5 holds lines that look like rows \(1\d such lines.*data.quoting: none")


def test_an_open_quote_in_a_csv_is_said(tmp_path):
    text = "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(20))
    text = text.replace("row 4", '"row 4').replace("row 9", 'row 9 end"')
    text = text.replace('row 9 end",1', 'row 9 end",1')
    assert said(corpus_of(tmp_path, "a.csv", text), "line 6 holds lines that look like rows")
    honest = "text,label\n" + "".join(f'"a review, {i}\nof two\nlines, or three",{i % 2}\n' for i in range(20))
    corpus = corpus_of(tmp_path, "b.csv", honest)
    assert len(texts_of(corpus)) == 20
    assert not corpus.notes


FIELDS = st.text(alphabet='ab" \t\n,', min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=150)
@given(st.lists(FIELDS, min_size=2, max_size=8), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
def test_a_tsv_written_with_quotes_all_over_is_read_back(tmp_path_factory, texts, quoting):
    path = tmp_path_factory.mktemp("d") / "a.tsv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows([text, place % 2] for place, text in enumerate(texts))
    source = Source("data.path", path, header=True, quoting="auto")
    assert [row[0] for _, row in delimited_rows(source, {"text": "text", "label": "label"})] == texts


@given(st.lists(st.text(alphabet='ab" ', min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=8))
def test_a_tsv_whose_quotes_are_not_all_in_pairs_keeps_every_sign(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("d") / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{place % 2}\n" for place, text in enumerate(['"x', *texts])))
    source = Source("data.path", path, header=True, quoting="auto")
    assert [row[0] for _, row in delimited_rows(source, {"text": "text", "label": "label"})] == ['"x', *texts]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_text_of_a_megabyte_is_read_and_the_library_keeps_its_limit(tmp_path, name):
    before = csv.field_size_limit()
    sign = "\t" if name == "a.tsv" else ","
    long = "a long decision " * 65_000
    corpus = corpus_of(tmp_path, name, f"text{sign}label\n{long}{sign}1\n" + f"short{sign}0\nother{sign}1\n" * 10)
    assert max(map(len, texts_of(corpus))) == len(long.strip())
    assert csv.field_size_limit() == before


def test_half_characters_are_replaced_and_counted(tmp_path):
    rows = [r'{"text": "sad \ud83d", "label": 0}', r'{"text": "glad \ud83d\ude00", "label": 1}'] * 10
    corpus = corpus_of(tmp_path, "a.jsonl", "\n".join(rows))
    assert set(texts_of(corpus)) == {"sad \ufffd", "glad \U0001f600"}
    assert said(corpus, r"half characters in 10 rows \(first: 1\)")


ROWS = [{"text": f"t {i}", "label": "ab"[i % 2], "more": i} for i in range(20)]


@pytest.mark.parametrize(
    "document",
    [
        ROWS,
        {"version": 1, "data": ROWS},
        {"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]},
    ],
    ids=["list", "inside", "columns"],
)
def test_json_documents(tmp_path, document):
    assert len(texts_of(corpus_of(tmp_path, "a.json", json.dumps(document, indent=1)))) == 20


def test_json_lines_called_json_and_single_objects(tmp_path):
    assert len(texts_of(corpus_of(tmp_path, "a.json", "\n".join(map(json.dumps, ROWS))))) == 20


def test_parquet_with_names_of_classes_from_the_hub(tmp_path):
    features = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": [f"t {i}" for i in range(20)], "label": [i % 2 for i in range(19)] + [-1]})
    path = tmp_path / "train.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    corpus = load_corpus(DataSettings(path=str(path)), seed=0)
    assert corpus.label_names == ("bad", "good")
    assert len(texts_of(corpus)) == 19
    with pytest.raises(DataError, match=r"column data.text 'txt' is not there; did you mean 'text'"):
        load_corpus(DataSettings(path=str(path), text="txt"), seed=0)


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ";"), ("a.txt", "\t"), ("a.txt", ","), ("a.csv", "\t")])
def test_tables_with_another_delimiter(tmp_path, name, sign):
    text = f"id{sign}text{sign}label\n" + "".join(f"{i}{sign}t {i}{sign}{i % 2}\n" for i in range(20))
    assert len(texts_of(corpus_of(tmp_path, name, text))) == 20
    by_place = corpus_of(tmp_path, name, text.partition("\n")[2], header=False, text=1, label=2)
    assert len(texts_of(by_place)) == 20


def test_test_data_that_tell_little_are_said(tmp_path):
    rows = "text\tlabel\n" + "".join(f"t {i}\t{i % 2}\n" for i in range(20))
    again, one = tmp_path / "again.tsv", tmp_path / "one.tsv"
    again.write_text(rows)
    one.write_text("text\tlabel\nnew a\t1\nnew b\t1\n")
    assert said(corpus_of(tmp_path, "a.tsv", rows, test_path=str(again)), "20 of 20 test rows are also training rows")
    assert said(corpus_of(tmp_path, "a.tsv", rows, test_path=str(one)), "all 2 test rows have the one label '1'")
    assert not corpus_of(tmp_path, "a.tsv", rows).notes


def test_a_column_that_is_there_twice_is_named_by_its_places(tmp_path):
    with pytest.raises(DataError, match=r"is there 2 times: give its place instead, 0 and 2 \(data.text=0") as caught:
        corpus_of(tmp_path, "a.tsv", "text\tlabel\ttext\na\t1\tb\n")
    assert "did you mean" not in str(caught.value)
