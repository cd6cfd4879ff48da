"""Catalogues: names looked up, taken, refused; and that the package's own entries hold what they name."""

import pytest

import fedsim
from fedsim.control.client_selection import SELECTIONS
from fedsim.control.policies import POLICIES, policy_facts
from fedsim.errors import ConfigError
from fedsim.learn.entries import CRITERIA, OBJECTIVES, RULES
from fedsim.methods.catalogue import METHODS, preferred_baselines
from fedsim.registry import Catalogue, loaded
from fedsim.runner.config import build_config
from fedsim.runner.names import CATALOGUES, names_of, own_names, unknown_names


@pytest.fixture
def catalogue():
    return Catalogue("some.key", (POLICIES["sucb"], POLICIES["uniform"]))


def test_names_are_looked_up_and_refused(catalogue):
    assert catalogue.named("sucb") is POLICIES["sucb"]
    with pytest.raises(
        ConfigError, match=r"unknown some\.key 'unifrm'; did you mean 'uniform'\? \(allowed: sucb, unif"
    ):
        catalogue.named("unifrm")


def test_own_entries_are_told_from_the_package_s(catalogue):
    catalogue.add(POLICIES["oracle"])
    assert catalogue.built_in == {"sucb", "uniform"}
    assert list(catalogue) == ["sucb", "uniform", "oracle"]
    for taken in ("sucb", "oracle"):
        with pytest.raises(ConfigError, match=f"'{taken}' exists already"):
            catalogue.add(POLICIES[taken])
    for name in ("", 3, None):
        with pytest.raises(ConfigError, match="is no name to register under"):
            catalogue.check_free(name)


@pytest.mark.parametrize(
    ("register", "known", "taken"),
    [
        (fedsim.register_policy, POLICIES, "sucb"),
        (fedsim.register_selection, SELECTIONS, "uniform"),
        (fedsim.register_rule, RULES, "stack"),
        (fedsim.register_objective, OBJECTIVES, None),
        (lambda name, function: fedsim.register_criterion(name, estimate=function), CRITERIA, "random"),
    ],
)
def test_every_kind_is_registered_alike(register, known, taken):
    before = dict(known)
    register("mine", print)
    assert known.pop("mine").name == "mine"
    assert known == before
    if taken:
        with pytest.raises(ConfigError, match=f"'{taken}' exists already"):
            register(taken, print)
    with pytest.raises(ConfigError, match="needs a function"):
        register("mine", 3)
    assert known == before


def test_the_package_s_functions_are_where_their_entries_say():
    places = [entry.merge for entry in RULES.values()]
    places += [place for entry in CRITERIA.values() for place in (entry.estimate, entry.static, entry.cohort) if place]
    assert len(places) == 6 + 6
    assert all(isinstance(place, str) and callable(loaded(place)) for place in places)


def test_facts_of_the_package_s_own():
    """Each by the names for which other parts once looked."""
    silent = {name for name, entry in POLICIES.items() if not entry.reads_rewards}
    assert silent == {"uniform", "random", "balanced", "oracle", "static_rank"}
    assert {name for name, entry in POLICIES.items() if entry.one_rank} == {"uniform", "e_ucb"}
    assert {name for name, entry in POLICIES.items() if not entry.chooses} == {"uniform"}
    assert {name for name, entry in POLICIES.items() if entry.is_reference} == {"uniform", "oracle"}
    assert {name for name, entry in RULES.items() if entry.equal_ranks} == {"average_factors"}
    assert {name for name, entry in RULES.items() if entry.sends_stacks} == {"stack"}
    assert {name for name, entry in CRITERIA.items() if entry.is_static} == {"magnitude", "random"}
    assert {name for name, entry in CRITERIA.items() if entry.every_linear} == {"lora_guided"}
    assert preferred_baselines() == ["fedlora", "fedspine_uniform"]


def test_a_policy_that_nobody_registered_here_is_taken_for_a_controller_that_learns():
    facts = policy_facts("theirs")
    assert (facts.name, facts.reads_rewards, facts.one_rank, facts.chooses, facts.explores) == ("theirs", 1, 0, 1, 1)


def test_every_name_of_a_run_has_a_catalogue():
    config = build_config({})
    assert names_of(config).keys() == CATALOGUES.keys()
    assert own_names(config) == {}
    names = {"method": "fedspine", "control.policy": "theirs", "server.selection": "hers"}
    assert [text.split(" (")[0] for text in unknown_names(names)] == [
        "unknown control.policy 'theirs'",
        "unknown server.selection 'hers'",
    ]
    assert METHODS.key == "method"
