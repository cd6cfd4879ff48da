"""The errors that a user can cause or put right.

Every error is one clear sentence that names the field, the value and what is allowed. The command line
prints it and exits with code 2. Each class takes the message as its only argument, because SimPy re-raises
a failed process's exception as ``type(e)(*e.args)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedsimError(Exception):
    """Base of all errors that are reported as one sentence instead of a traceback."""


class ConfigError(FedsimError):
    """A configuration key or value is not usable."""


class DataError(FedsimError):
    """A data file or its content is not usable."""


class ProfileError(FedsimError):
    """A device profile or a fleet file is not usable."""


class ModelError(FedsimError):
    """A model folder, hub name or architecture is not usable."""


class RunError(FedsimError):
    """A run directory is missing, locked, finished, damaged or cannot be written."""


class ResourceError(FedsimError):
    """The machine cannot go on: no memory for one client, or a device that failed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The sentence for a name that is not one of `allowed`, with the nearest one suggested."""
    options = sorted(allowed)
    return f"unknown {kind} '{name}'{nearest(name, options)} (allowed: {', '.join(options)})"
