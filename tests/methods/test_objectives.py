"""Objectives of methods: their gradients by hand, and that both engines minimise the same thing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedsim.contracts.program import ExtraCost, LocalProgram, Phase, Trained, extra_cost
from fedsim.errors import ConfigError
from fedsim.methods.base import scheduled_rate
from fedsim.methods.catalogue import METHODS, method_named
from fedsim.methods.fedprox import Proximal
from fedsim.methods.scaffold import ControlVariates
from fedsim.runner.config import build_config


def trained(seed, clients=3):
    """Two Linears and a head, in float64."""
    draws = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(clients, *shape, generator=draws, dtype=torch.float64)

    return Trained({"one": (random(2, 5), random(2, 4)), "other": (random(2, 3), random(2, 6))}, {"w": random(3, 2)})


def with_gradient(tensors):
    return tensors.mapped(lambda tensor: tensor.clone().requires_grad_(True))


RANKS = np.array([2, 2, 2])


def test_the_proximal_term_is_half_mu_times_the_squared_distance_client_by_client():
    now, start = with_gradient(trained(0)), trained(1)
    penalty = Proximal(0.3).penalty(now, start, RANKS)
    for client in range(3):
        distance = sum(
            float(((w[client] - first[client]) ** 2).sum().detach())
            for w, first in zip(now.tensors(), start.tensors(), strict=True)
        )
        assert float(penalty[client].detach()) == pytest.approx(0.15 * distance)
    penalty.sum().backward()
    for w, first in zip(now.tensors(), start.tensors(), strict=True):
        torch.testing.assert_close(w.grad, 0.3 * (w.detach() - first))


def test_a_correction_adds_the_servers_variate_and_takes_the_clients_own():
    scaffold, shared, own, now = ControlVariates(), trained(2), trained(3), with_gradient(trained(4))
    carried = scaffold.carried(shared, own)
    scaffold.carrying(carried).penalty(now, now, RANKS).sum().backward()
    for w, server, client in zip(now.tensors(), shared.tensors(), own.tensors(), strict=True):
        torch.testing.assert_close(w.grad, server - client)
    # Option II under SGD: the variate is the mean gradient of the plain loss.
    plain = trained(5)
    corrected = plain.combined(carried, torch.add)
    kept = scaffold.kept(carried, corrected, now, now)
    for got, want in zip(kept.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(got, want)
    merged = scaffold.merged(shared, own, 10)
    for got, server, change in zip(merged.tensors(), shared.tensors(), own.tensors(), strict=True):
        torch.testing.assert_close(got, server + change / 10)


def test_option_two_is_the_mean_gradient_under_plain_descent():
    """K steps of SGD on a quadratic: ``c_k - c + (x - y) / (K eta)`` against what `kept` makes of the mean gradient."""
    target, start, shared, own = (trained(seed, clients=1) for seed in (6, 7, 8, 9))
    scaffold, rate, steps = ControlVariates(), 0.1, 4
    carried = scaffold.carried(shared, own)
    objective, now, total = scaffold.carrying(carried), with_gradient(start), None
    for _ in range(steps):
        loss = sum(((w - goal) ** 2).sum() for w, goal in now.pairs(target)) + objective.penalty(now, start, RANKS[:1])
        gradients = torch.autograd.grad(loss.sum(), list(now.tensors()))
        places = iter(gradients)
        step = now.mapped(lambda tensor, places=places: next(places))
        total = step if total is None else total.combined(step, torch.add)
        now = with_gradient(now.combined(step, lambda w, g: (w - rate * g).detach()))
    kept = scaffold.kept(carried, total.mapped(lambda tensor: tensor / steps), now, start)
    for got, c, c_k, x, y in zip(*(own.tensors() for own in (kept, shared, own, start, now)), strict=True):
        torch.testing.assert_close(got, c_k - c + (x - y.detach()) / (steps * rate))


def test_what_a_program_may_be():
    with pytest.raises(ConfigError, match="has no steps"):
        LocalProgram((Phase(0, 0.1),))
    with pytest.raises(ConfigError, match="a phase of -1 steps"):
        Phase(-1, 0.1)
    with pytest.raises(ConfigError, match="learning rate of nan"):
        Phase(1, float("nan"))
    with pytest.raises(ConfigError, match="cuts more than once"):
        LocalProgram((Phase(1, 0.1, cut_before=True), Phase(1, 0.1, cut_before=True)))

    @dataclasses.dataclass
    class Unhashable:
        def penalty(self, now, start, ranks):
            return 0.0

    with pytest.raises(ConfigError, match="objective Unhashable cannot be hashed"):
        LocalProgram((Phase(1, 0.1),), Unhashable())

    class Priceless:
        extra_cost = 3.0

    with pytest.raises(ConfigError, match=r"Priceless has an extra_cost that is no"):
        extra_cost(Priceless())
    assert extra_cost(None) == extra_cost(Unhashable()) == ExtraCost()


def test_a_dose_is_the_sum_of_the_rates_of_steps_that_train():
    program = LocalProgram((Phase(3, 0.5), Phase(2, 0.25, trains=False), Phase(1, 0.125, cut_before=True)))
    assert (program.steps, program.cuts, program.estimates, program.dose) == (6, True, False, 1.625)
    assert LocalProgram((Phase(2, 0.1, estimate=True),)).estimates
    assert not LocalProgram((Phase(2, 0.1), Phase(0, 0.1, estimate=True))).estimates
    # Like steps in two phases are one product: what a surrogate was fitted with, to the bit.
    assert LocalProgram((Phase(15, 0.1), Phase(5, 0.1))).dose == 20 * 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_program_takes_the_local_steps_at_the_rate_of_the_round(method):
    config = build_config({"method": method, "server": {"rounds": 10}})
    for index in range(10):
        program = method_named(method).local_program(index, config)
        assert program.steps == config.train.local_steps
        assert all(phase.rate == scheduled_rate(index, config) for phase in program.phases)
        assert program.cuts == (
            method_named(method).prunes and method_named(method).iterative and index >= config.prune_warmup_rounds
        )
        if not method_named(method).prunes:
            assert not program.estimates


def test_the_warm_variant_estimates_late_and_recovers_at_its_own_rate():
    config = build_config({"method": "fedspine_warm"}, {"method_options.recovery_rate": 0.5, "server.rounds": 8})
    assert config.method_options == {"warm_steps": None, "recovery_rate": 0.5}
    early, late = (method_named("fedspine_warm").local_program(index, config) for index in (0, 4))
    assert [phase.steps for phase in late.phases] == [5, 10, 5]
    assert [phase.estimate for phase in late.phases] == [False, True, False]
    assert [phase.cut_before for phase in late.phases] == [False, False, True]
    assert [phase.rate for phase in late.phases] == [0.5e-3, 0.5e-3, 0.25e-3]
    assert not early.cuts
    with pytest.raises(ConfigError, match=r"method_options\.warm_steps: value 15 is not allowed \(at most 14"):
        build_config({"method": "fedspine_warm"}, {"method_options.warm_steps": 15})
    with pytest.raises(ConfigError, match=r"method_options\.warm_steps: value 12 is not allowed \(at most 11"):
        build_config({"method": "fedspine_warm"}, {"method_options.warm_steps": 12, "prune.importance_every": 6})


def test_scaffold_refuses_rules_that_make_new_factors():
    with pytest.raises(ConfigError, match=r"'lowrank' is not allowed with method scaffold"):
        build_config({"method": "scaffold"}, {"aggregate.rule": "lowrank"})
