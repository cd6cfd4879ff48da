"""fedsim: federated fine-tuning with real learning on simulated devices.

``fedsim.run(config, **overrides)``, ``fedsim.load(directory)``, ``fedsim.sweep(config, grid=..., seeds=...)``,
``fedsim.load_sweep(directory)`` are the Python interface; ``fedsim.register_method``, ``register_policy``,
``register_selection``, ``register_protocol``, ``register_rule``, ``register_criterion`` and ``register_objective`` take
parts of your own.
Importing the package loads none of the heavy libraries; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.contracts.program import ExtraCost, LocalProgram, Phase
    from fedsim.control.client_selection import register_selection
    from fedsim.control.policies import register_policy
    from fedsim.families.family import Family
    from fedsim.families.family_catalogue import register_family
    from fedsim.learn.entries import register_criterion, register_objective, register_rule
    from fedsim.learn.export.exported import load_exported
    from fedsim.methods.base import Method, tuning
    from fedsim.methods.catalogue import register_method
    from fedsim.plots.own_figures import register_figure
    from fedsim.records.own_columns import register_column
    from fedsim.records.reader import Run, load
    from fedsim.runner.clock import Clock
    from fedsim.runner.run import run
    from fedsim.study.export_run import export_run
    from fedsim.sweeps.sweep import Sweep, load_sweep, sweep

__all__ = [
    "Clock",
    "ExtraCost",
    "Family",
    "LocalProgram",
    "Method",
    "Phase",
    "Run",
    "Sweep",
    "export_run",
    "load",
    "load_exported",
    "load_sweep",
    "register_column",
    "register_criterion",
    "register_family",
    "register_figure",
    "register_method",
    "register_objective",
    "register_policy",
    "register_protocol",
    "register_rule",
    "register_selection",
    "run",
    "sweep",
    "tuning",
]

_HOMES = {
    "Clock": "fedsim.runner.clock",
    "run": "fedsim.runner.run",
    "load": "fedsim.records.reader",
    "Run": "fedsim.records.reader",
    "sweep": "fedsim.sweeps.sweep",
    "load_sweep": "fedsim.sweeps.sweep",
    "Sweep": "fedsim.sweeps.sweep",
    "export_run": "fedsim.study.export_run",
    "load_exported": "fedsim.learn.export.exported",
    "Family": "fedsim.families.family",
    "register_family": "fedsim.families.family_catalogue",
    "Method": "fedsim.methods.base",
    "tuning": "fedsim.methods.base",
    "LocalProgram": "fedsim.contracts.program",
    "Phase": "fedsim.contracts.program",
    "ExtraCost": "fedsim.contracts.program",
    "register_method": "fedsim.methods.catalogue",
    "register_policy": "fedsim.control.policies",
    "register_protocol": "fedsim.sim.protocol_names",
    "register_selection": "fedsim.control.client_selection",
    "register_rule": "fedsim.learn.entries",
    "register_criterion": "fedsim.learn.entries",
    "register_objective": "fedsim.learn.entries",
    "register_column": "fedsim.records.own_columns",
    "register_figure": "fedsim.plots.own_figures",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
