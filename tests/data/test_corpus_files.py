"""Files into corpora: what is read, and the one sentence for what is not."""

import gzip
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from fedsim.data.corpus import load_corpus
from fedsim.data.fingerprint import corpus_hash
from fedsim.errors import DataError
from fedsim.settings import DataSettings


def write(folder, name, text):
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


TRAIN = "text\tlabel\tplace\n" + "".join(f"sentence {i}\t{'yes' if i % 2 else 'no'}\tp{i % 3}\n" for i in range(20))


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "A.TSV"])
def test_tsv_plain_and_gzipped_give_the_rows(tmp_path, name):
    path = write(tmp_path, name, TRAIN)
    corpus = load_corpus(DataSettings(path=path, test_path=path, field="place"), seed=0)
    assert corpus.label_names == ("no", "yes")
    assert corpus.train.texts[:2] == ("sentence 0", "sentence 1")
    assert corpus.train.labels.dtype == np.int64
    assert corpus.train.labels.tolist() == [0, 1] * 10
    assert corpus.train.fields is not None
    assert corpus.train.fields[:4] == ("p0", "p1", "p2", "p0")
    assert corpus.train.pairs is None


def test_csv_quotes_hold_delimiters_and_line_breaks_and_the_byte_order_mark_goes(tmp_path):
    path = write(tmp_path, "a.csv", '\ufefftext,label\n"one, ""two""\nthree",1\nfour,0\n')
    corpus = load_corpus(DataSettings(path=path, test_path=path), seed=0)
    assert corpus.train.texts == ('one, "two"\nthree', "four")


def test_quoting_none_keeps_bare_quotes(tmp_path):
    path = write(tmp_path, "a.tsv", '"open\t1\nshut"\t0\n')
    settings = DataSettings(path=path, test_path=path, header=False, quoting="none", text=0, label=1)
    assert load_corpus(settings, seed=0).train.texts == ('"open', 'shut"')


def test_integer_labels_are_ordered_as_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", "\n".join(f'{{"text": "t", "label": {label}}}' for label in (10, 9, 2)))
    corpus = load_corpus(DataSettings(path=path, test_path=path), seed=0)
    assert corpus.label_names == ("2", "9", "10")
    assert corpus.train.labels.tolist() == [2, 1, 0]


def test_jsonl_pair_with_separator_character_inside(tmp_path):
    row = '{"a": "one\u2028two", "b": "three", "gold": "%s"}\n'
    path = write(tmp_path, "a.jsonl.gz", row % "x" + row % "y")
    corpus = load_corpus(DataSettings(path=path, test_path=path, text="a", pair="b", label="gold"), seed=0)
    assert corpus.train.texts[0] == "one\u2028two"
    assert corpus.train.pairs == ("three", "three")


def test_test_text_names_the_other_column(tmp_path):
    train = write(tmp_path, "a.tsv", "label\tsentence\n0\ta\n1\tb\n")
    test = write(tmp_path, "b.tsv", "label\tcontent\n1\tc\n")
    corpus = load_corpus(DataSettings(path=train, test_path=test, text="sentence", test_text="content"), seed=0)
    assert corpus.test.texts == ("c",)
    assert corpus.test.labels.tolist() == [1]


def test_held_out_fifth_is_seeded_disjoint_and_has_every_label(tmp_path):
    settings = DataSettings(path=write(tmp_path, "a.tsv", TRAIN))
    corpus, again, other = (load_corpus(settings, seed) for seed in (3, 3, 4))
    assert (len(corpus.train), len(corpus.test)) == (16, 4)
    assert sorted(corpus.train.texts + corpus.test.texts) == sorted(f"sentence {i}" for i in range(20))
    assert sorted(corpus.test.labels) == [0, 0, 1, 1]
    assert corpus_hash(corpus) == corpus_hash(again) != corpus_hash(other)


def test_max_samples_is_a_seeded_subset_in_file_order(tmp_path):
    path = write(tmp_path, "a.tsv", TRAIN)
    picks = [
        load_corpus(DataSettings(path=path, test_path=path, max_samples=7), seed).train.texts for seed in (0, 0, 1)
    ]
    assert picks[0] == picks[1] != picks[2]
    numbers = [int(text.split()[1]) for text in picks[0]]
    assert len(numbers) == 7
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "", ["data.path", "empty"]),
        ("a.tsv", "text\tlabel\n", ["no rows below the header"]),
        ("a.tsv", "sentence\tlabel\na\t1\n", ["data.text 'text'", "columns: sentence, label"]),
        ("a.tsv", "texts\tlabel\na\t1\n", ["did you mean 'texts'?"]),
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", ["2 times", "0 and 1", "data.text=0"]),
        ("a.tsv", "text\tlabel\na\t1\nb\n", ["line 3", "1 columns where the first row has 2"]),
        ("a.tsv", "text\tlabel\na\t1\n \t0\n", ["line 3", "data.text is empty"]),
        ("a.tsv", "text\tlabel\na\t1\nb\t1\n", ["1 distinct values", "at least 2"]),
        ("a.csv", 'text,label\n"a,1\nb,0\n', ["cannot be parsed", "data.quoting: none"]),
        ("a.tsv", b"text\tlabel\na\t1\nb\xff\t0\n", ["line 3", "0xff is not UTF-8"]),
        ("a.tsv", "text\tlabel\na\t1\nb\t0\n", ["too few to hold out a fifth", "data.test_path"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ["line 2", "data.label 'label'", "columns: text"]),
        ("a.jsonl", '{"text": "a"\n', ["line 1", "not JSON"]),
        ("a.jsonl", "[1]\n", ["line 1", "not a JSON object"]),
        ("a.jsonl", '{"text": 3, "label": 1}\n', ["line 1", "data.text is 3"]),
        ("a.jsonl", '{"text": "a", "label": null}\n', ["line 1", "none of the 1 rows has a gold label"]),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', ["line 1", "data.label is [1]"]),
        ("a.jsonl", '{"text": "a", "label": 1' + "0" * 5000 + "}\n", ["line 1", "not JSON"]),
        ("a.jsonl", "[" * 100_000 + "\n", ["line 1", "nested too deeply"]),
        ("a.json", "[" * 100_000, ["nested too deeply"]),
        ("a.json", '[{"text": "a"}]', ["line 1", "data.label 'label'"]),
        ("a.parquet", "no parquet", ["not a whole Parquet file"]),
        ("a.doc", "a", ["unknown kind of file", ".tsv, .csv, .txt, .jsonl"]),
    ],
)
def test_unusable_file_is_refused_in_one_sentence(tmp_path, name, text, words):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError) as caught:
        load_corpus(DataSettings(path=path), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    assert all(word in message for word in words), message


def test_missing_file_folder_and_damaged_gzip_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data.path .*none.tsv': no such file"):
        load_corpus(DataSettings(path=str(tmp_path / "none.tsv")), seed=0)
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match=r"cannot be read"):
        load_corpus(DataSettings(path=str(tmp_path / "folder.tsv")), seed=0)
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(TRAIN.encode())[:-9])
    with pytest.raises(DataError, match=r"not a whole gzip file"):
        load_corpus(DataSettings(path=str(tmp_path / "cut.tsv.gz")), seed=0)


def test_label_only_in_the_test_file_is_refused_with_its_line(tmp_path):
    train = write(tmp_path, "a.tsv", TRAIN)
    test = write(tmp_path, "b.tsv", "text\tlabel\na\tyes\nb\tmaybe\n")
    with pytest.raises(DataError, match=r"data.test_path .*line 3: data.label 'maybe' never .*labels there: no, yes"):
        load_corpus(DataSettings(path=train, test_path=test), seed=0)


def test_columns_by_index_need_to_exist_and_names_need_a_header(tmp_path):
    path = write(tmp_path, "a.tsv", "a\t1\nb\t0\n")
    with pytest.raises(DataError, match=r"data.label is 2, but the file has columns 0 to 1"):
        load_corpus(DataSettings(path=path, header=False, text=0, label=2), seed=0)
    with pytest.raises(
        DataError, match=r"data.text is 'text', but with data.header: false columns go by index, 0 to 1"
    ):
        load_corpus(DataSettings(path=path, header=False, label=1), seed=0)


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"both given"):
        load_corpus(DataSettings(name="synthetic", path="a.tsv"), seed=0)
    with pytest.raises(DataError, match=r"needs data.path"):
        load_corpus(DataSettings(name="synthetic", test_path="a.tsv"), seed=0)


class FakeSplit(dict):
    """As much of ``datasets.Dataset`` as is used."""

    column_names = property(lambda self: list(self))
    features = property(lambda self: {**dict.fromkeys(self), "label": SimpleNamespace(names=["bad", "good"])})


@pytest.fixture
def fake_datasets(monkeypatch):
    module = ModuleType("datasets")
    calls = []

    def load_dataset(name, configuration):
        calls.append((name, configuration))
        if name == "away":
            raise ConnectionError("no route\nto host")
        rows = FakeSplit(text=["a", "b", "c"], label=[0, 1, 1])
        hidden = FakeSplit(text=["x"], label=[-1])
        return {"train": rows, "test": hidden, "validation": FakeSplit(text=["d"], label=[1])}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_name_uses_class_names_and_skips_a_test_split_with_hidden_labels(fake_datasets):
    corpus = load_corpus(DataSettings(name="owner/set:part"), seed=0)
    assert fake_datasets == [("owner/set", "part")]
    assert corpus.label_names == ("bad", "good")
    assert corpus.test.texts == ("d",)
    assert corpus.test.labels.tolist() == [1]


def test_hub_faults_are_one_sentence(fake_datasets, monkeypatch):
    with pytest.raises(
        DataError, match=r"data.name 'away' cannot be loaded from the hub \(ConnectionError: no route\)"
    ):
        load_corpus(DataSettings(name="away"), seed=0)
    with pytest.raises(DataError, match=r"data.text 'sentence' is not there \(columns: text, label\)"):
        load_corpus(DataSettings(name="near", text="sentence"), seed=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library 'datasets'"):
        load_corpus(DataSettings(name="near"), seed=0)


def test_hash_sees_every_part_and_where_strings_end(tmp_path):
    def digest(text):
        path = write(tmp_path, "a.tsv", text)
        return corpus_hash(load_corpus(DataSettings(path=path, test_path=path), seed=0))

    texts = ["text\tlabel\nab\t1\nc\t0\n", "text\tlabel\na\t1\nbc\t0\n", "text\tlabel\nab\t0\nc\t1\n"]
    assert len({digest(text) for text in texts}) == 3
