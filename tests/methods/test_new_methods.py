"""FedProx, FedAdam and SCAFFOLD in whole runs: what they are without their own term, on both engines, and resumed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import fedsim
from fedsim.methods.fedadam import Options, ServerAdam

SMALL = {
    "fleet.clients": 4,
    "server.rounds": 3,
    "prune.warmup_rounds": 1,
    "prune.end_round": 2,
    "train.precision": "fp32",
    "evaluate.panel": 1,
    "evaluate.max_samples": 40,
    "evaluate.every_rounds": 1,
    "records.events": False,
}
LEARNED = ["loss_before", "loss_after"]


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    def run(method, **options):
        out = tmp_path_factory.mktemp(method) / "run"
        return fedsim.run("quickstart", method=method, out=out, quiet=True, **SMALL, **options)

    return run


@pytest.fixture(scope="module")
def plain(play):
    return play("fedlora")


def test_fedprox_without_its_term_is_fedlora_to_the_bit(play, plain):
    own = play("fedprox", **{"method_options.mu": 0.0})
    pd.testing.assert_frame_equal(own.client_rounds[LEARNED], plain.client_rounds[LEARNED], check_exact=True)
    assert own.rounds["loss"].tolist() == plain.rounds["loss"].tolist()
    assert (own.client_rounds["compute_s"] > plain.client_rounds["compute_s"]).all()
    assert own.rounds["bytes_up"].tolist() == plain.rounds["bytes_up"].tolist()


def test_a_heavy_proximal_term_keeps_clients_where_they_were(play, plain):
    held = play("fedprox", **{"method_options.mu": 1000.0})
    moved = [(run.client_rounds["loss_before"] - run.client_rounds["loss_after"]).mean() for run in (held, plain)]
    assert moved[0] < 0.6 * moved[1]


def test_scaffold_starts_as_fedlora_and_pays_twice_for_traffic(play, plain):
    own = play("scaffold")
    first, later = (own.client_rounds["round"] == 0, own.client_rounds["round"] > 0)
    for column in LEARNED:
        one, other = own.client_rounds[column], plain.client_rounds[column]
        np.testing.assert_array_equal(one[first], other[first])
    assert (own.client_rounds["loss_after"][later] != plain.client_rounds["loss_after"][later]).all()
    for column in ("bytes_up", "bytes_down"):
        np.testing.assert_allclose(own.rounds[column], 2 * plain.rounds[column], rtol=1e-12)


@pytest.mark.parametrize("method", ["fedprox", "fedadam", "scaffold", "fedspine_warm"])
def test_both_engines_agree(play, method):
    one, other = (play(method, **{"train.engine": engine}).client_rounds for engine in ("auto", "reference"))
    for column in LEARNED:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-3, atol=1e-4, err_msg=column)


def test_the_servers_adam_against_a_transcription():
    """Algorithm 2 of arXiv 2003.00295, entry by entry, over three merges of two tensors; resumed after the second."""
    options = Options(server_rate=0.1, beta1=0.8, beta2=0.9, adaptivity=0.01)
    draws, first, second = np.random.default_rng(0), {}, {}
    server = ServerAdam(options)
    for merge in range(3):
        if merge == 2:
            state, server = server.state(), ServerAdam(options)
            server.restore(state)
        for name, shape in (("A.one", (2, 3)), ("head.w", (4,))):
            delta = draws.standard_normal(shape)
            step = server(name, torch.from_numpy(delta))
            for place in np.ndindex(shape):
                key = (name, *place)
                first[key] = 0.8 * first.get(key, 0.0) + (1 - 0.8) * delta[place]
                second[key] = 0.9 * second.get(key, 0.0) + (1 - 0.9) * delta[place] ** 2
                assert float(step[place]) == pytest.approx(0.1 * first[key] / (second[key] ** 0.5 + 0.01), rel=1e-9)


def test_a_tensor_that_was_not_merged_since_the_checkpoint_keeps_its_moments():
    server = ServerAdam(Options())
    server("A.one", torch.ones(2))
    again = ServerAdam(Options())
    again.restore(server.state())
    again("A.other", torch.ones(2))
    assert set(again.state()) == {"first.A.one", "second.A.one", "first.A.other", "second.A.other"}
    assert torch.equal(server("A.one", torch.ones(2)), again("A.one", torch.ones(2)))


def test_fedadam_moves_by_the_servers_rate(play, plain):
    """Its first merge is one step of about eta: the larger the rate, the farther."""
    small, large = (play("fedadam", **{"method_options.server_rate": rate}) for rate in (1e-6, 1e-2))
    assert abs(small.rounds["loss"].iloc[0] - small.rounds["loss"].iloc[-1]) < 1e-3
    assert large.rounds["loss"].iloc[-1] < small.rounds["loss"].iloc[-1] - 1e-2
    assert large.rounds["end_s"].tolist() == plain.rounds["end_s"].tolist()
