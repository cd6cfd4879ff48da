"""What goes with which ``server.mode``: keys that another mode knows, and methods that need whole rounds."""

from __future__ import annotations

from collections.abc import Iterator

from fedsim.control.client_selection import SELECTIONS
from fedsim.errors import unknown
from fedsim.learn.entries import RULES
from fedsim.methods.base import Method, never
from fedsim.settings import Config, ServerSettings
from fedsim.sim.protocol_names import PROTOCOLS

_ONLY = {
    "concurrency": ("semi_async", "async"),
    "buffer": ("semi_async",),
    "staleness": ("semi_async", "async"),
    "max_staleness": ("semi_async", "async"),
}
"""Keys that some modes alone have a use for."""


def mode_faults(config: Config, method: Method) -> Iterator[str]:
    """Why this configuration cannot run under its ``server.mode``, a sentence each."""
    server, mode = config.server, config.server.mode
    for key, modes in _ONLY.items():
        value, default = getattr(server, key), ServerSettings.model_fields[key].default
        if mode in PROTOCOLS.built_in and mode not in modes and value != default:
            shown = value.rule if key == "staleness" else value
            yield (
                f"server.{key}: value {shown} is not allowed with server.mode {mode} (only with "
                f"{' or '.join(modes)}; leave it out)"
            )
    selection = SELECTIONS.get(server.selection)
    if selection is not None and selection.reads_losses and config.train.engine == "none":
        yield (
            f"server.selection: value '{selection.name}' is not allowed with train.engine none (it goes by losses, and "
            "nothing is trained)"
        )
    if mode not in PROTOCOLS:
        yield unknown("server.mode", mode, PROTOCOLS)
    if mode == "sync":
        return
    if server.clock == "arrays":
        yield (
            f"server.clock: value 'arrays' is not allowed with server.mode {mode} (arrays play flights that leave "
            "together and end together: processes, or auto)"
        )
    if method.prunes and config.prune.selection == "global":
        yield (
            f"prune.selection: value 'global' is not allowed with server.mode {mode} (what a job costs is then known "
            "only once it is trained, so every dispatch would train alone; layer_local is allowed)"
        )
    rule = RULES.get(config.aggregate.rule)
    if rule is not None and rule.sends_stacks:
        yield (
            f"aggregate.rule: value {rule.name!r} is not allowed with server.mode {mode} (clients take the "
            "stack of every round once: it needs whole rounds, so server.mode sync, or another rule)"
        )
    if method.prunes and method.cuts_after is not never:
        yield (
            f"method: value '{config.method}' is not allowed with server.mode {mode} (it cuts the whole fleet at one "
            "moment, and flights under way would bring back what was cut: use server.mode sync)"
        )
