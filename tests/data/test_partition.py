"""Every split is a true partition without an empty client, and does what its name says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.labelled import LabelledText
from fedsim.data.partition import partition
from fedsim.errors import DataError
from fedsim.settings import DataSettings


def corpus(labels, fields=None):
    texts = tuple(f"t{i}" for i in range(len(labels)))
    return LabelledText(texts, None, np.array(labels, dtype=np.int64), fields)


@st.composite
def splits(draw):
    rows = draw(st.integers(1, 120))
    clients = draw(st.integers(1, rows))
    labels = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    fields = tuple(f"v{value}" for value in draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows)))
    kind = draw(st.sampled_from(["iid", "dirichlet", "field"]))
    alpha = draw(st.sampled_from([1e-3, 0.1, 1.0, 1e4]))
    return corpus(labels, fields), DataSettings(partition=kind, alpha=alpha), clients, draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(splits())
def test_each_row_belongs_to_exactly_one_client_and_no_client_is_empty(case):
    text, chosen, clients, seed = case
    shares = partition(text, chosen, clients, seed)
    assert len(shares) == clients
    assert min(len(share) for share in shares) >= 1
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(text)))
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)
    again = partition(text, chosen, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "field"])
def test_the_seed_matters(kind):
    text = corpus([0, 1] * 50, tuple(f"v{i % 3}" for i in range(100)))
    first, second = (partition(text, DataSettings(partition=kind), 10, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_shares_differ_by_one_row_at_most():
    sizes = [len(share) for share in partition(corpus([0, 1] * 51), DataSettings(partition="iid"), 8, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_shares_have_the_variance_of_their_distribution():
    """Share of a label's rows is Beta(a, (K-1)a): variance (1/K)(1-1/K)/(K a + 1)."""
    clients, alpha = 20, 2.0
    text = corpus([0] * 20_000 + [1] * 20_000)
    parts = []
    for seed in range(40):
        for share in partition(text, DataSettings(partition="dirichlet", alpha=alpha), clients, seed):
            parts.append((share < 20_000).sum() / 20_000)
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.var(parts) == pytest.approx(expected, rel=0.25)


def test_small_alpha_makes_labels_uneven_and_large_alpha_even():
    text = corpus([0, 1] * 2_000)

    def imbalance(alpha):
        shares = partition(text, DataSettings(partition="dirichlet", alpha=alpha), 10, 0)
        return np.mean([abs(text.labels[share].mean() - 0.5) for share in shares])

    assert imbalance(0.1) > 0.25 > 0.05 > imbalance(1e4)


def test_field_with_fewer_values_than_clients_never_mixes_values_and_gives_clients_in_proportion():
    fields = ("a",) * 60 + ("b",) * 30 + ("c",) * 10
    shares = partition(corpus([0, 1] * 50, fields), DataSettings(partition="field"), 10, 0)
    values = [{fields[row] for row in share} for share in shares]
    assert all(len(value) == 1 for value in values)
    assert [values.count({value}) for value in "abc"] == [6, 3, 1]


def test_field_with_more_values_than_clients_keeps_each_value_whole():
    fields = tuple(f"v{i % 30}" for i in range(300))
    shares = partition(corpus([0, 1] * 150, fields), DataSettings(partition="field"), 7, 0)
    values = [{fields[row] for row in share} for share in shares]
    assert sum(len(value) for value in values) == 30
    assert max(len(share) for share in shares) - min(len(share) for share in shares) <= 10


def test_faults_name_field_and_value():
    with pytest.raises(DataError, match=r"fleet.clients is 3, but the training data has 2 rows"):
        partition(corpus([0, 1]), DataSettings(), 3, 0)
    with pytest.raises(DataError, match=r"data.field is not set"):
        partition(corpus([0, 1]), DataSettings(partition="field"), 2, 0)
