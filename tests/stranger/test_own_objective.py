"""A method with an objective of its own, as a user writes it: in one file, with no edit of the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import fedsim
from fedsim.errors import ConfigError
from fedsim.runner.config import build_config
from fedsim.settings import Section

# -- what a user writes -----------------------------------------------------------------------------------------------


class Options(Section):
    """``weight`` of the decay; ``warm`` steps come first, at half the rate."""

    weight: float = 0.1
    warm: int = 2


@dataclass(frozen=True)
class Decay:
    """``weight / 2`` times the squared norm of LoRA's B: a client keeps its update small."""

    weight: float
    extra_cost = fedsim.ExtraCost(flops=2.0, memory_bytes=12.0)

    def penalty(self, now, start, ranks):
        return 0.5 * self.weight * sum((b**2).sum(dim=(1, 2)) for _, b in now.factors.values())


def program(round_index, config):
    own = Options.model_validate(config.method_options)
    rate = config.train.learning_rate
    phases = (fedsim.Phase(own.warm, rate / 2), fedsim.Phase(config.train.local_steps - own.warm, rate))
    return fedsim.LocalProgram(phases, Decay(own.weight))


MINE = fedsim.Method(
    name="decayed",
    summary="LoRA whose updates are held small",
    sources=(),
    prunes=False,
    defaults={"control.policy": "uniform", "aggregate.rule": "average_factors"},
    program=program,
    options=Options,
)

# -- and what comes of it ---------------------------------------------------------------------------------------------

SMALL = {
    "fleet.clients": 3,
    "server.rounds": 2,
    "evaluate.panel": 2,
    "evaluate.max_samples": 40,
    "train.precision": "fp32",
    "records.events": False,
}


def test_it_runs_on_both_engines_resumes_its_options_and_costs_what_it_says(tmp_path):
    fedsim.register_method("decayed", MINE)

    def play(name, **options):
        return fedsim.run("quickstart", method="decayed", out=tmp_path / name, quiet=True, **SMALL, **options)

    heavy, reference, light = (
        play("heavy", **{"method_options.weight": 300.0}),
        play("reference", **{"method_options.weight": 300.0, "train.engine": "reference"}),
        play("light", **{"method_options.weight": 0.0}),
    )
    assert heavy.config["method_options"] == {"weight": 300.0, "warm": 2}
    one, other = (run.client_rounds["loss_after"].to_numpy() for run in (heavy, reference))
    np.testing.assert_allclose(one, other, rtol=1e-3)
    assert (np.abs(one - light.client_rounds["loss_after"]) > 1e-3).any()  # the penalty is in the loss
    plain = fedsim.run("quickstart", method="fedlora", out=tmp_path / "plain", quiet=True, **SMALL)
    dearer = heavy.client_rounds["compute_s"] - plain.client_rounds["compute_s"]
    assert (dearer > 0).all()
    assert (dearer < 0.05 * plain.client_rounds["compute_s"]).all()


def test_a_misspelt_option_is_named(tmp_path):
    fedsim.register_method("decayed", MINE)
    with pytest.raises(ConfigError, match=r"'method_options\.wieght'; did you mean 'weight'\?"):
        fedsim.run("quickstart", method="decayed", out=tmp_path, **{"method_options.wieght": 1.0})


def test_a_registered_objective_is_taken_by_its_name():
    fedsim.register_objective("decay", lambda config: Decay(config.train.learning_rate))
    config = build_config({"method": "fedlora", "train": {"learning_rate": 0.25}})
    assert fedsim.tuning(0, config, "decay") == fedsim.tuning(0, config, Decay(0.25))
    with pytest.raises(ConfigError, match=r"unknown objective 'decai'; did you mean 'decay'\?"):
        fedsim.tuning(0, config, "decai")
