"""Methods with state of their own (ranks, stacks, a base, moments, variates) go on from a checkpoint to the bit."""

from __future__ import annotations

import pandas as pd
import pytest

import fedsim
from fedsim.federation.federation import Federation

OVERRIDES = {
    "fleet.clients": 4,
    "server.rounds": 4,
    "server.clients_per_round": 2,
    "server.checkpoint_every": 1,
    "prune.warmup_rounds": 1,
    "prune.end_round": 3,
    "evaluate.panel": 1,
    "evaluate.max_samples": 20,
    "evaluate.every_rounds": 2,
    "records.events": False,
}


class StoppedError(Exception):
    """The run is killed here."""


@pytest.mark.parametrize("method", ["hetlora", "flora", "fedapt", "fedadam", "scaffold"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, tmp_path, monkeypatch):
    options = {**OVERRIDES, "method": method}
    if method == "hetlora":
        options["method_options.rank_penalty"] = 20.0  # so that ranks are given up before the stop
    whole = fedsim.run("quickstart", out=tmp_path / "whole", quiet=True, **options)
    real = Federation.dispatch

    def stopping(self, clients, version, now_s):
        if version == 2:
            raise StoppedError
        return real(self, clients, version, now_s)

    monkeypatch.setattr(Federation, "dispatch", stopping)
    with pytest.raises(StoppedError):
        fedsim.run("quickstart", out=tmp_path / "stopped", quiet=True, **options)
    monkeypatch.undo()
    again = fedsim.run("quickstart", out=tmp_path / "stopped", quiet=True, resume=True, **options)
    assert again.manifest["trace_hash"] == whole.manifest["trace_hash"]
    pd.testing.assert_frame_equal(again.rounds.drop(columns="host_s"), whole.rounds.drop(columns="host_s"))
    pd.testing.assert_frame_equal(again.client_rounds, whole.client_rounds)
    files = [path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "whole", tmp_path / "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ranks = whole.client_rounds["lora_rank"]
    if method == "hetlora":
        assert not set(ranks) <= {2, 4, 8, 16}
    if method == "flora":
        assert whole.rounds["bytes_down"].iloc[2:].min() > whole.rounds["bytes_down"].iloc[0]
