"""The names that a configuration gives to parts of a run, and the catalogues that know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.control.client_selection import SELECTIONS
from fedsim.control.policies import POLICIES
from fedsim.errors import ConfigError, unknown
from fedsim.learn.entries import CRITERIA, RULES
from fedsim.methods.catalogue import METHODS
from fedsim.registry import Catalogue
from fedsim.settings import Config
from fedsim.sim.protocol_names import PROTOCOLS

CATALOGUES: Mapping[str, Catalogue[Any]] = {
    catalogue.key: catalogue for catalogue in (METHODS, POLICIES, RULES, CRITERIA, SELECTIONS, PROTOCOLS)
}
"""By configuration key."""


def names_of(config: Config) -> dict[str, str]:
    """The names that a run goes by, by configuration key."""
    return {
        METHODS.key: config.method,
        POLICIES.key: config.control.policy,
        RULES.key: config.aggregate.rule,
        CRITERIA.key: config.prune.criterion,
        SELECTIONS.key: config.server.selection,
        PROTOCOLS.key: config.server.mode,
    }


def own_names(config: Config) -> dict[str, str]:
    """Those of them that are a user's own, by configuration key."""
    return {key: name for key, name in names_of(config).items() if name not in CATALOGUES[key].built_in}


def unknown_names(names: Mapping[str, str]) -> list[str]:
    """A sentence for each name, by configuration key, that nothing in this process goes by."""
    return [unknown(key, name, CATALOGUES[key]) for key, name in names.items() if name not in CATALOGUES[key]]


def check_names(config: Config) -> None:
    """Refuse names that nothing goes by.

    Raises:
        ConfigError: with a sentence for each.
    """
    faults = unknown_names(names_of(config))
    if faults:
        raise ConfigError("\n  and ".join(faults))
