"""fedsim: federated fine-tuning with real learning on simulated devices.

``fedsim.run(config, **overrides)``, ``fedsim.load(directory)``, ``fedsim.sweep(config, grid=..., seeds=...)``,
``fedsim.load_sweep(directory)`` and ``fedsim.register_method(name, method)`` are the Python interface.
Importing the package loads none of the heavy libraries; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.experiment.export import export_run
    from fedsim.experiment.results import Run, load
    from fedsim.experiment.run import run
    from fedsim.learn.export import load_exported
    from fedsim.methods.base import Method
    from fedsim.methods.catalogue import register_method
    from fedsim.sweeps.sweep import Sweep, load_sweep, sweep

__all__ = [
    "Method",
    "Run",
    "Sweep",
    "export_run",
    "load",
    "load_exported",
    "load_sweep",
    "register_method",
    "run",
    "sweep",
]

_HOMES = {
    "run": "fedsim.experiment.run",
    "load": "fedsim.experiment.results",
    "Run": "fedsim.experiment.results",
    "sweep": "fedsim.sweeps.sweep",
    "load_sweep": "fedsim.sweeps.sweep",
    "Sweep": "fedsim.sweeps.sweep",
    "export_run": "fedsim.experiment.export",
    "load_exported": "fedsim.learn.export",
    "Method": "fedsim.methods.base",
    "register_method": "fedsim.methods.catalogue",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
