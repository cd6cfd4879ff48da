"""Fleet files: which devices, in which power modes, behind which links. Reading and checking only.

A fleet file is YAML:

.. code-block:: yaml

    name: my-fleet
    description: what it stands for          # optional
    clients: 80                              # default: one per listed device
    mode_period: 20                          # rounds between re-draws of the power modes; 0 (default): never
    compute_jitter_sigma: {value: 0.02, unit: "1", status: assumed, source: "...", low: 0.0, high: 0.1}
    devices:                                 # client i is device (i mod length of this list)
      - {profile: jetson-tx2, count: 3}      # a built-in profile; count (default 1) repeats the line
      - {profile: my-board.yaml, mode: uniform}          # a YAML profile beside this file; any of its modes, evenly
      - {profile: jetson-orin-nano, mode: MODE_15W}      # one fixed mode
      - {profile: jetson-nano, mode: {MAXN: 0.7, 5W: 0.3}, link: slow}
    links:                                   # device j of the list, in the b-th pass over it, gets link (j + b) mod n
      fast: {down_mbps: 20, up_mbps: {low: 15, high: 25}, latency_ms: 5, jitter_sigma: 0.1}
      slow: {down_mbps: 3, up_mbps: 3}

`mode` is ``fastest`` (default: the profile's default mode), ``uniform``, a mode's name, or weights by name. A number is
``{value, unit, status, source, low, high, draw}``: with ``draw: fixed`` (default) every client has `value`, and `low`
and `high` are its uncertainty; with ``draw: uniform`` each client draws its own between `low` and `high`. In short, a
bare number is a fixed value and ``{low, high}`` without `value` a uniform draw; both count as ``assumed``.
Every client is the same whatever the number of clients. What changes in time (availability, drop-out, throttling,
shared links ...) is described in `fedsim.fleet.world_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedsim.errors import ProfileError, nearest, unknown
from fedsim.fleet.number import Number, Part, check_unit, fixed
from fedsim.fleet.world_file import (
    AccessPoint,
    Availability,
    Daily,
    Dropout,
    OnOff,
    Replay,
    Roaming,
    ServerLink,
    Throttle,
    ThrottleStep,
    TraceFile,
    check_range,
)
from fedsim.places import user_path
from fedsim.resources import resource_folder
from fedsim.settings import MOST_CLIENTS
from fedsim.yaml_text import YamlError, read_yaml, shown

PositiveInt = Annotated[int, Field(ge=1, le=MOST_CLIENTS)]
MOST_SIGMA = 2.0
"""The largest spread of a jitter's logarithm: beyond it most times vanish beside a few huge ones. [ours]"""
_LEAST_MBPS, _MOST_MBPS = 1e-4, 1e6
_MOST = {"latency_ms": 1e6, "jitter_sigma": MOST_SIGMA}


class LinkSpec(Part):
    """One kind of link. Bandwidths in Mb/s (10^6 bits per second), latency in ms one way."""

    down_mbps: Number
    up_mbps: Number
    latency_ms: Number = fixed(0.0)
    jitter_sigma: Number = fixed(0.0)

    @model_validator(mode="after")
    def _sane(self) -> LinkSpec:
        for name, unit in (("down_mbps", "Mb/s"), ("up_mbps", "Mb/s"), ("latency_ms", "ms"), ("jitter_sigma", "1")):
            number: Number = getattr(self, name)
            check_unit(name, number, unit)
            if number.smallest < 0 or (name.endswith("mbps") and number.smallest == 0):
                bound = "above 0" if name.endswith("mbps") else "at least 0"
                raise ValueError(f"{name} is {number.smallest:g}, it must be {bound}")
            low, high = (_LEAST_MBPS, _MOST_MBPS) if name.endswith("mbps") else (0.0, _MOST[name])
            if number.smallest < low or number.largest > high:
                beyond = number.smallest if number.smallest < low else number.largest
                raise ValueError(
                    f"{name} is {beyond:g} {unit}, which no link has (allowed: {low:g} to {high:g}{_hint(name)})"
                )
        return self


class DeviceSpec(Part):
    """`count` devices of one kind."""

    profile: str
    count: PositiveInt = 1
    mode: str | dict[str, Annotated[float, Field(gt=0)]] = "fastest"
    link: str | None = None
    access_point: str | None = None
    join_s: Number | None = None
    leave_s: Number | None = None

    @model_validator(mode="after")
    def _sane(self) -> DeviceSpec:
        for name in ("join_s", "leave_s"):
            number: Number | None = getattr(self, name)
            if number is not None:
                check_range(name, number, "s", 0.0, 1e9)
        return self


class FleetFile(Part):
    """A whole fleet file, checked but for the names of profiles and modes."""

    name: str
    description: str = ""
    clients: PositiveInt | None = None
    mode_period: Annotated[int, Field(ge=0)] = 0
    compute_jitter_sigma: Number = fixed(0.02)
    devices: Annotated[list[DeviceSpec], Field(min_length=1)]
    links: Annotated[dict[str, LinkSpec], Field(min_length=1)]
    availability: Availability | None = None
    dropout: Dropout | None = None
    throttle: Throttle | None = None
    mode_period_s: Number | None = None
    overhead: Number = fixed(0.0)
    replay: Replay | None = None
    roaming: Roaming | None = None
    access_points: dict[str, AccessPoint] = Field(default_factory=dict)
    server_link: ServerLink | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FleetFile:
        check_unit("compute_jitter_sigma", self.compute_jitter_sigma, "1")
        if self.compute_jitter_sigma.smallest < 0 or self.compute_jitter_sigma.draw != "fixed":
            raise ValueError("compute_jitter_sigma must be one fixed number of at least 0")
        if self.compute_jitter_sigma.value > MOST_SIGMA:
            raise ValueError(
                f"compute_jitter_sigma is {self.compute_jitter_sigma.value:g} (allowed: 0 to {MOST_SIGMA:g}"
                f"{_hint('jitter_sigma')})"
            )
        for device in self.devices:
            if device.link is not None and device.link not in self.links:
                raise ValueError(unknown("link", device.link, self.links))
        self._check_world()
        return self

    def _check_world(self) -> None:
        if self.mode_period_s is not None:
            check_range("mode_period_s", self.mode_period_s, "s", 1.0, 1e9)
            if self.mode_period_s.draw != "fixed":
                raise ValueError("mode_period_s must be one fixed number")
            if self.mode_period:
                raise ValueError("mode_period (rounds) and mode_period_s (seconds) exclude each other")
        if self.roaming is not None and self.replay is not None:
            raise ValueError("roaming and replay exclude each other")
        for name in [] if self.replay is None else self.replay.links or []:
            if name not in self.links:
                raise ValueError(f"replay.links: {unknown('link', name, self.links)}")
        check_range("overhead", self.overhead, "1", 0.0, 10.0)
        if self.overhead.draw != "fixed":
            raise ValueError("overhead must be one fixed number")
        if self.roaming is not None and len(self.links) == 1:
            raise ValueError("roaming needs at least two links to move between")

    @property
    def pattern(self) -> list[DeviceSpec]:
        """The listed devices one by one, counts expanded."""
        return [device for device in self.devices for _ in range(device.count)]


def _hint(name: str) -> str:
    return "; the standard deviation of the time's logarithm, so 0.1 for about 10 %" if "sigma" in name else ""


def fleet_names() -> list[str]:
    """Names of the built-in fleets."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return resource_folder("device_profiles") / "fleets"


def fleet_path(name: str) -> Path:
    """The file of a built-in fleet, or of a user's own.

    Raises:
        ProfileError: neither a built-in fleet nor an existing YAML file.
    """
    if name in fleet_names():
        return _folder() / f"{name}.yaml"
    path = user_path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ProfileError(f"fleet.name is '{name}', but there is no such file")
    raise ProfileError(f"fleet.name: {unknown('fleet', name, fleet_names())}, or the path of a YAML file")


def profile_path(path: Path, reference: str) -> Path:
    """The file of a profile that the fleet file `path` names: beside it, or one that travels with the package."""
    if reference.endswith((".yaml", ".yml")):
        return path.parent / user_path(reference)
    return resource_folder("device_profiles") / f"{reference}.yaml"


def profile_paths(path: Path) -> dict[str, Path]:
    """The files of all profiles of a fleet file, by the names that it gives them.

    Raises:
        ProfileError: as of `read_fleet_file`.
    """
    references = dict.fromkeys(device.profile for device in read_fleet_file(path).devices)
    return {reference: profile_path(path, reference) for reference in references}


def read_fleet_file(path: Path) -> FleetFile:
    """Read and check a fleet file.

    Raises:
        ProfileError: the file cannot be read, is not YAML, or a field is missing, unknown or out of range.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"fleet file '{path}' cannot be read: {error}") from error
    except YamlError as error:
        raise ProfileError(f"fleet file '{path}' is not YAML that can be used: {error}") from error
    if not isinstance(content, dict):
        raise ProfileError(
            f"fleet file '{path}' must hold keys and values (allowed: {', '.join(FleetFile.model_fields)})"
        )
    try:
        return FleetFile.model_validate(content)
    except ValidationError as error:
        raise ProfileError(f"fleet file '{path}': {_sentence(error)}") from error


_MODELS: dict[str, type[BaseModel]] = {"devices": DeviceSpec, "links": LinkSpec, "access_points": AccessPoint}
_PARTS: dict[str, type[BaseModel]] = {
    "dropout": Dropout,
    "throttle": Throttle,
    "replay": Replay,
    "roaming": Roaming,
    "server_link": ServerLink,
    "availability.on_off": OnOff,
    "availability.daily": Daily,
    "availability.trace": TraceFile,
}


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's complaints: field, value and what is allowed."""
    complaints = error.errors()
    # A mode may be a name or weights: where both readings fail, the one that got further says more.
    same_field = [each for each in complaints if each["loc"][:3] == complaints[0]["loc"][:3]]
    first = max(same_field, key=lambda each: len(each["loc"]))
    parts = [str(part) for part in first["loc"]]
    field = ".".join(part for part in parts if part != "str" and not part.startswith("dict[")) or "the file"
    if first["type"] == "extra_forbidden":
        key, parents = str(first["loc"][-1]), first["loc"][:-1]
        if not parents:
            fields = FleetFile.model_fields
        elif len(parents) == 2 and parents[0] in _MODELS:
            fields = _MODELS[str(parents[0])].model_fields
        elif ".".join(map(str, parents)) in _PARTS:
            fields = _PARTS[".".join(map(str, parents))].model_fields
        elif parents[:2] == ("throttle", "steps"):
            fields = ThrottleStep.model_fields
        else:
            fields = Number.model_fields
        return f"{field} is not a known key{nearest(key, fields)} (allowed: {', '.join(fields)})"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    given = f" is {shown(repr(value))}" if isinstance(value, (str, int, float, bool, type(None), list)) else ""
    return f"{field}{given}: {message[0].lower()}{message[1:]}"


def world_files(path: Path) -> list[Path]:
    """Files beside a fleet file that it names for what changes: an availability file, bandwidth traces."""
    try:
        spec = read_fleet_file(path)
    except ProfileError:
        return []  # loading the fleet will say so
    found: list[Path] = []
    if isinstance(spec.availability, TraceFile):
        found.append(path.parent / user_path(spec.availability.file))
    if spec.replay is not None:
        folder = path.parent / user_path(spec.replay.folder)
        if folder.is_dir():
            found += sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
    return found
