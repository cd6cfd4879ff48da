"""The merge's exact cases, its invariances and its refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.learn.entries import RULES, RuleEntry
from fedsim.learn.merge import coverage
from fedsim.learn.merge import rules as aggregate
from fedsim.learn.merge.rules import Contribution, client_weights, merge
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.linears import Role, kept_columns, kept_rows, prunable_linears
from fedsim.settings import AggregateSettings
from fedsim.structure import ModelShape, Structure, kept_counts

SHAPE = ModelShape("small", "roberta", 2, 24, 4, 4, 6, 40, 10, 8)
C = 2.0
LOWRANK = AggregateSettings()
AVERAGE = AggregateSettings(rule="average_factors")
EVERY = [linear.name for linear in prunable_linears(SHAPE)]


def _structure(ratio: float, draw: np.random.Generator) -> Structure:
    heads, channels = kept_counts(SHAPE, ratio)
    masks = Structure(np.zeros((2, 4), dtype=bool), np.zeros((2, 40), dtype=bool))
    for layer in range(2):
        masks.head_mask[layer, draw.permutation(4)[:heads]] = True
        masks.channel_mask[layer, draw.permutation(40)[:channels]] = True
    return masks


def _contribution(seed: int, rank: int = 4, ratio: float = 0.0, samples: int = 10) -> Contribution:
    draw = np.random.default_rng(seed)
    structure, factors = _structure(ratio, draw), {}
    for linear in prunable_linears(SHAPE):
        rows, columns = kept_rows(linear, structure, SHAPE), kept_columns(linear, structure, SHAPE)
        a = draw.standard_normal((rank, linear.d_in if columns is None else len(columns)))
        b = draw.standard_normal((linear.d_out if rows is None else len(rows), rank))
        factors[linear.name] = (torch.from_numpy(a).float(), torch.from_numpy(b).float())
    head = {"weight": torch.from_numpy(draw.standard_normal((2, 24))).float()}
    return Contribution(Adapter(factors, head), structure, samples, float(draw.random()))


def _previous(rank: int = 8) -> Adapter:
    return _contribution(999, rank).adapter


def _update(adapter: Adapter, name: str) -> torch.Tensor:
    a, b = adapter.factors[name]
    return C * b.double() @ a.double()


def _assert_same_updates(left: Adapter, right: Adapter, tolerance: float = 5e-6) -> None:
    for name in EVERY:
        expected = _update(right, name)
        scale = float(torch.linalg.matrix_norm(expected, ord=2))
        torch.testing.assert_close(_update(left, name), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("rank_max", [4, 8])
def test_one_whole_client_comes_back(rank_max):
    only = _contribution(1, rank=4)
    merged = merge(_previous(), [only], SHAPE, rank_max, C, LOWRANK)
    assert merged.rank == rank_max
    _assert_same_updates(merged, only.adapter, 1e-6)
    assert torch.equal(merged.head["weight"], only.adapter.head["weight"])


def test_one_pruned_client_comes_back_and_the_rest_is_held():
    only, previous = _contribution(2, rank=3, ratio=0.5), _previous(4)
    merged = merge(previous, [only], SHAPE, 7, C, LOWRANK)  # 7 = 3 + 4: nothing is truncated
    for linear in prunable_linears(SHAPE):
        expected = _update(previous, linear.name)
        rows, columns = kept_rows(linear, only.structure, SHAPE), kept_columns(linear, only.structure, SHAPE)
        assert (rows is None) != (columns is None)
        if rows is not None:
            expected[rows] = _update(only.adapter, linear.name)
        else:
            expected[:, columns] = _update(only.adapter, linear.name)
        torch.testing.assert_close(_update(merged, linear.name), expected, rtol=0, atol=5e-5)


def test_truncation_moves_held_rows():
    """The consequence that the module names: held rows are exact before the truncation only."""
    only, previous = _contribution(2, rank=3, ratio=0.5), _previous(4)
    merged = merge(previous, [only], SHAPE, 2, C, LOWRANK)
    name = EVERY[0]
    held = np.setdiff1d(np.arange(24), kept_rows(prunable_linears(SHAPE)[0], only.structure, SHAPE))
    assert not torch.allclose(_update(merged, name)[held], _update(previous, name)[held], atol=1e-2)


def test_equal_ranks_without_pruning_give_the_exact_mean():
    clients = [_contribution(seed, rank=4, samples=seed) for seed in (1, 2, 3)]
    merged = merge(_previous(), clients, SHAPE, 12, C, LOWRANK)
    for name in EVERY:
        mean = sum(client.samples / 6 * _update(client.adapter, name) for client in clients)
        torch.testing.assert_close(_update(merged, name), mean, rtol=0, atol=5e-5)


def test_mean_of_lower_rank_survives_a_small_rank_max():
    first = _contribution(1, rank=4)
    scaled = {name: (a, 3.0 * b) for name, (a, b) in first.adapter.factors.items()}
    second = dataclasses.replace(first, adapter=Adapter(scaled, first.adapter.head))
    merged = merge(_previous(), [first, second], SHAPE, 4, C, LOWRANK)
    for name in EVERY:
        torch.testing.assert_close(_update(merged, name), 2 * _update(first.adapter, name), rtol=0, atol=5e-5)


def test_components_that_nobody_filled_stay_trainable():
    previous = _previous(8)
    merged = merge(previous, [_contribution(1, rank=4)], SHAPE, 10, C, LOWRANK)
    for name in EVERY:
        a, b = merged.factors[name]
        assert torch.equal(a[4:8], previous.factors[name][0][4:])
        assert torch.count_nonzero(b[:, 4:]) == 0
        assert torch.count_nonzero(a[8:]) == 0
        assert not torch.equal(a[:4], previous.factors[name][0][:4])


@pytest.mark.parametrize("factored", [True, False])
def test_bits_repeat_and_buffers_do_not_matter(factored, monkeypatch):
    monkeypatch.setattr(aggregate, "factored_is_cheaper", lambda d_out, d_in, rank_sum: factored)
    clients = [_contribution(seed, rank=1 + seed % 4, ratio=0.1 * seed) for seed in range(8)]
    first, again = (merge(_previous(), clients, SHAPE, 8, C, LOWRANK) for _ in range(2))
    monkeypatch.setattr(coverage, "_BUFFER_ELEMENTS", 1)
    one_by_one = merge(_previous(), clients, SHAPE, 8, C, LOWRANK)
    for name in EVERY:
        assert torch.equal(first.factors[name][0], again.factors[name][0])
        assert torch.equal(first.factors[name][1], again.factors[name][1])
    _assert_same_updates(one_by_one, first)


def test_chunks_stay_within_their_limit_and_lose_no_client(monkeypatch):
    monkeypatch.setattr(coverage, "_BUFFER_ELEMENTS", 1)
    clients = [_contribution(seed, rank=1 + seed % 4, ratio=0.5) for seed in range(60)]
    linear = prunable_linears(SHAPE)[0]
    device, ranks = torch.device("cpu"), np.array([client.adapter.rank for client in clients])
    structures = [client.structure for client in clients]
    chunks = coverage.coverage_of(linear, structures, ranks, client_weights(clients, 0.0), SHAPE, device).chunks
    assert sorted(client for chunk in chunks for client in chunk.clients) == list(range(60))
    assert 4 < len(chunks) < 30
    for chunk in chunks:
        assert {clients[client].adapter.rank for client in chunk.clients} == {chunk.rank}
        pairs = [clients[client].adapter.factors[linear.name] for client in chunk.clients]
        pruned, whole = coverage.concatenate(chunk, pairs, False, device)
        assert pruned.numel() + whole.numel() <= linear.d_out * linear.d_in


rounds = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.7]), st.integers(1, 99)),
    min_size=2,
    max_size=5,
    unique_by=lambda client: client[0],
)


@settings(max_examples=15, deadline=None)
@given(clients=rounds, shuffle=st.randoms(use_true_random=False), times=st.integers(2, 1000))
def test_order_and_scale_of_weights_do_not_matter(clients, shuffle, times):
    contributions = [_contribution(*client) for client in clients]
    asked = AggregateSettings(importance_weight=0.5)
    merged = merge(_previous(), contributions, SHAPE, 24, C, asked)
    shuffled = list(contributions)
    shuffle.shuffle(shuffled)
    _assert_same_updates(merge(_previous(), shuffled, SHAPE, 24, C, asked), merged)
    scaled = [dataclasses.replace(c, samples=c.samples * times) for c in contributions]
    _assert_same_updates(merge(_previous(), scaled, SHAPE, 24, C, asked), merged)
    louder = [dataclasses.replace(c, importance=c.importance * times) for c in contributions]
    _assert_same_updates(merge(_previous(), louder, SHAPE, 24, C, asked), merged)


def test_order_changes_no_factor_beyond_rounding():
    contributions = [_contribution(seed, rank=2 + seed, ratio=0.2 * seed) for seed in range(4)]
    merged = merge(_previous(), contributions, SHAPE, 8, C, LOWRANK)
    turned = merge(_previous(), contributions[::-1], SHAPE, 8, C, LOWRANK)
    for name in EVERY:
        torch.testing.assert_close(turned.factors[name], merged.factors[name], rtol=1e-3, atol=1e-4)


def test_weights_by_hand():
    clients = [_contribution(1, samples=1), _contribution(2, samples=3)]
    clients = [dataclasses.replace(c, importance=i) for c, i in zip(clients, (2.0, 1.0), strict=True)]
    np.testing.assert_allclose(client_weights(clients, 0.0), [0.25, 0.75])
    np.testing.assert_allclose(client_weights(clients, 1.0), [2 / 6.5, 4.5 / 6.5])  # 1 (1 + 1), 3 (1 + 1/2)
    silent = [dataclasses.replace(c, importance=0.0) for c in clients]
    np.testing.assert_allclose(client_weights(silent, 1.0), [0.25, 0.75])
    unknown = [clients[0], dataclasses.replace(clients[1], importance=float("nan"))]
    np.testing.assert_allclose(client_weights(unknown, 0.0), [0.25, 0.75])
    with pytest.raises(ValueError, match="importance"):
        client_weights(unknown, 1.0)


@pytest.mark.parametrize("rule", [LOWRANK, AVERAGE])
def test_head_is_the_weighted_mean(rule):
    clients = [_contribution(1, samples=1), _contribution(2, samples=3, ratio=0.5)]
    merged = merge(_previous(), clients, SHAPE, 8, C, rule)
    expected = 0.25 * clients[0].adapter.head["weight"] + 0.75 * clients[1].adapter.head["weight"]
    torch.testing.assert_close(merged.head["weight"], expected)


def test_average_factors_takes_means_apart():
    clients = [_contribution(1, samples=1), _contribution(2, samples=3)]
    merged = merge(_previous(), clients, SHAPE, 32, C, AVERAGE)
    assert merged.rank == 4
    for name in EVERY:
        for which in (0, 1):
            parts = [client.adapter.factors[name][which] for client in clients]
            torch.testing.assert_close(merged.factors[name][which], 0.25 * parts[0] + 0.75 * parts[1])


def test_average_factors_refuses_mixed_ranks():
    with pytest.raises(ConfigError, match=r"aggregate\.rule 'average_factors' needs one LoRA rank.*2, 4"):
        merge(_previous(), [_contribution(1, 4), _contribution(2, 2)], SHAPE, 8, C, AVERAGE)
    with pytest.raises(ConfigError, match=r"rank 8 beside clients of rank 4"):
        merge(_previous(8), [_contribution(1, 4, ratio=0.5)], SHAPE, 8, C, AVERAGE)


@pytest.mark.parametrize("rule", [LOWRANK, AVERAGE])
def test_results_are_contiguous_float32_of_full_width(rule):
    merged = merge(_previous(4), [_contribution(seed, ratio=0.5) for seed in range(3)], SHAPE, 4, C, rule)
    assert list(merged.factors) == EVERY
    for linear in prunable_linears(SHAPE):
        a, b = merged.factors[linear.name]
        assert (a.shape, b.shape) == ((4, linear.d_in), (linear.d_out, 4))
        assert a.dtype == b.dtype == torch.float32
        assert a.is_contiguous()
        assert b.is_contiguous()


def test_a_subset_of_targets_is_merged_alone():
    names = {linear.name for linear in prunable_linears(SHAPE) if linear.role in (Role.QUERY, Role.VALUE)}

    def only(adapter: Adapter) -> Adapter:
        return Adapter({name: pair for name, pair in adapter.factors.items() if name in names}, adapter.head)

    clients = [_contribution(seed, ratio=0.5) for seed in range(3)]
    whole = merge(_previous(), clients, SHAPE, 8, C, LOWRANK)
    part = merge(
        only(_previous()),
        [dataclasses.replace(c, adapter=only(c.adapter)) for c in clients],
        SHAPE,
        8,
        C,
        LOWRANK,
    )
    assert set(part.factors) == names
    for name in names:
        torch.testing.assert_close(part.factors[name], whole.factors[name], rtol=0, atol=0)


def test_nothing_arrived_changes_nothing():
    previous = _previous()
    assert merge(previous, [], SHAPE, 8, C, LOWRANK) is previous


def test_inputs_are_left_alone():
    client, previous = _contribution(1, ratio=0.5), _previous(4)
    tensors = [t for adapter in (client.adapter, previous) for pair in adapter.factors.values() for t in pair]
    before = [tensor.clone() for tensor in tensors]
    for rule in (LOWRANK, AVERAGE):
        merge(previous, [client, _contribution(2)], SHAPE, 4, C, rule)
    assert all(map(torch.equal, before, tensors))


def test_unknown_rule_is_refused_with_the_nearest_and_a_rule_can_be_added(monkeypatch):
    asked = AggregateSettings(rule="lowrnk")
    with pytest.raises(ConfigError, match=r"unknown aggregate\.rule 'lowrnk'; did you mean 'lowrank'\?"):
        merge(_previous(), [_contribution(1)], SHAPE, 8, C, asked)
    monkeypatch.setitem(RULES, "lowrnk", RuleEntry("lowrnk", lambda merging: merging.contributions[0].adapter))
    client = _contribution(1)
    assert merge(_previous(), [client], SHAPE, 8, C, asked) is client.adapter


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_reduced_precision_of_training_does_not_reach_the_merge(allowed, monkeypatch):
    seen = []
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    look = RuleEntry("look", lambda merging: seen.extend(b.fp32_precision for b in backends) or merging.previous)
    monkeypatch.setitem(RULES, "look", look)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        before = [backend.fp32_precision for backend in backends]
        merge(_previous(), [_contribution(1)], SHAPE, 8, C, AggregateSettings(rule="look"))
        assert seen == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == before
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(usual)


def test_strangers_are_refused():
    client = _contribution(1)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        merge(_previous(), [dataclasses.replace(client, samples=0)], SHAPE, 8, C, LOWRANK)
    fewer = Adapter(dict(list(client.adapter.factors.items())[1:]), client.adapter.head)
    with pytest.raises(ValueError, match="other layers"):
        merge(_previous(), [dataclasses.replace(client, adapter=fewer)], SHAPE, 8, C, LOWRANK)
    headless = Adapter(client.adapter.factors, {})
    with pytest.raises(ValueError, match="other parameters"):
        merge(_previous(), [dataclasses.replace(client, adapter=headless)], SHAPE, 8, C, LOWRANK)
    shallow = dataclasses.replace(SHAPE, layers=1)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1.*which small does not have"):
        merge(_previous(), [client], shallow, 8, C, LOWRANK)
