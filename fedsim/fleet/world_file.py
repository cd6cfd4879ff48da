"""What a fleet file says of a world that changes: who is there when, what breaks, slows down or is shared.

All of it is optional, and off where it is not said.

.. code-block:: yaml

    availability: {kind: on_off, mean_on_s: 3600, mean_off_s: 600}     # exponential; who goes off drops its flight
    # or {kind: daily, period_s: 86400, start_s: 79200, on_s: 28800, spread_s: 7200}     # one stretch a day
    # or {kind: trace, file: trace.csv, repeat_s: 172800}              # client,start_s,end_s; csv or parquet
    dropout: {download: 0.01, compute: 0.02, upload: 0.01}             # chance per flight to be lost in that phase
    throttle: {steps: [{after_busy_s: 300, rate: 0.8}, {after_busy_s: 900, rate: 0.6}], recover_s: 600}
    mode_period_s: 1800                                                # power modes re-drawn in seconds, not in rounds
    overhead: 0.06                                                     # of protocols, as a share of the payload
    replay: {folder: traces, attribution: "who measured them"}         # bandwidth traces; links: [a, b] for some
    roaming: {mean_stay_s: 600}                                        # or: clients move between the listed links
    access_points: {hall: {}, attic: {half_duplex: true}}              # shared: processor sharing of their airtime
    server_link: {down_mbps: 200, up_mbps: 100}                        # what all transfers together get
    devices:
      - {profile: jetson-tx2, access_point: hall, join_s: {low: 0, high: 3600}, leave_s: 86400}

Numbers are as everywhere in a fleet file: bare, or with unit, status and source.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedsim.fleet.number import Number, Part, check_unit, fixed

_MOST_S = 1e9
_LEAST_S = 1.0
"""The shortest mean or period of something that changes again and again: below it a run would do little else. [ours]"""


def check_range(name: str, number: Number, unit: str, low: float, high: float) -> None:
    """Refuse a number in another unit, or one that any client could draw outside ``low`` to ``high``."""
    check_unit(name, number, unit)
    if number.smallest < low or number.largest > high:
        beyond = number.smallest if number.smallest < low else number.largest
        raise ValueError(f"{name} is {beyond:g} {unit} (allowed: {low:g} to {high:g})")


def _one(name: str, number: Number) -> None:
    if number.draw != "fixed":
        raise ValueError(f"{name} must be one fixed number")


class OnOff(Part):
    """On and off in turn, each for an exponential time. At the start each client is on with its long-run chance."""

    kind: Literal["on_off"]
    mean_on_s: Number
    mean_off_s: Number

    @model_validator(mode="after")
    def _sane(self) -> OnOff:
        check_range("mean_on_s", self.mean_on_s, "s", _LEAST_S, _MOST_S)
        check_range("mean_off_s", self.mean_off_s, "s", _LEAST_S, _MOST_S)
        return self


class Daily(Part):
    """On once a day for `on_s`, from `start_s` on; each day's start is moved by a uniform draw over `spread_s`."""

    kind: Literal["daily"]
    period_s: Number = fixed(86400.0)
    start_s: Number = fixed(0.0)
    on_s: Number
    spread_s: Number = fixed(0.0)

    @model_validator(mode="after")
    def _sane(self) -> Daily:
        check_range("period_s", self.period_s, "s", _LEAST_S, _MOST_S)
        check_range("on_s", self.on_s, "s", _LEAST_S, _MOST_S)
        check_range("start_s", self.start_s, "s", 0.0, _MOST_S)
        check_range("spread_s", self.spread_s, "s", 0.0, _MOST_S)
        if self.on_s.largest + self.spread_s.largest > self.period_s.smallest:
            raise ValueError("on_s and spread_s together must fit into period_s, or one day's stretch meets the next's")
        return self


class TraceFile(Part):
    """Stretches that somebody recorded: client i follows the file's client number i modulo their number, by name.

    With `repeat_s` the file begins anew after so many seconds; else who has no stretch left is gone.
    """

    kind: Literal["trace"]
    file: str
    repeat_s: Annotated[float, Field(gt=0, le=_MOST_S)] | None = None


Availability = Annotated[OnOff | Daily | TraceFile, Field(discriminator="kind")]


class Dropout(Part):
    """The chance that a flight is lost in each phase that it comes to; where in the phase is a uniform draw."""

    download: Number = fixed(0.0)
    compute: Number = fixed(0.0)
    upload: Number = fixed(0.0)

    @model_validator(mode="after")
    def _sane(self) -> Dropout:
        for name in ("download", "compute", "upload"):
            check_range(name, getattr(self, name), "1", 0.0, 1.0)
        if min(1.0 - getattr(self, name).largest for name in ("download", "compute", "upload")) == 0.0:
            raise ValueError("a chance of 1 loses every flight, and no client would ever finish (allowed: below 1)")
        return self


class ThrottleStep(Part):
    """From so many busy seconds on, the rate of computing is this share of the full one."""

    after_busy_s: Annotated[float, Field(gt=0, le=_MOST_S)]
    rate: Annotated[float, Field(ge=0.01, le=1.0)]


class Throttle(Part):
    """A device that slows down when it has been busy, and recovers fully in `recover_s` of not computing.

    Busy seconds rise by one a second of computing, up to the last step's, and fall evenly when the device does not
    compute.
    """

    steps: Annotated[list[ThrottleStep], Field(min_length=1)]
    recover_s: Annotated[float, Field(gt=0, le=_MOST_S)]
    status: Literal["spec", "measured", "derived", "extrapolated", "assumed"] = "assumed"
    source: str = "the fleet file"

    @model_validator(mode="after")
    def _rising(self) -> Throttle:
        marks = [step.after_busy_s for step in self.steps]
        if any(later <= earlier for earlier, later in pairwise(marks)):
            raise ValueError(f"after_busy_s must rise from step to step, not {marks}")
        return self


class Roaming(Part):
    """Clients move between the listed links, to a neighbour in the list, after an exponential stay in each."""

    mean_stay_s: Number

    @model_validator(mode="after")
    def _sane(self) -> Roaming:
        check_range("mean_stay_s", self.mean_stay_s, "s", _LEAST_S, _MOST_S)
        return self


class Replay(Part):
    """A folder of bandwidth traces, lines of ``seconds Mbit/s``: the variation is replayed, the mean is the link's own.

    Take traces as they are and say whose they are; none travel with this package.

    Each client draws a trace and where in it it begins; after its end a trace begins anew.

    Attributes:
        attribution: whose traces these are.
        links: names of the links that follow a trace; None: all.
        floor: what lies below this share of a trace's mean is raised to it; without it, zeros are refused.
        max_gap_s: a longer time between two lines is refused as a gap.
    """

    folder: str
    attribution: Annotated[str, Field(min_length=3)]
    links: list[str] | None = None
    floor: Annotated[float, Field(gt=0, le=1)] | None = None
    max_gap_s: Annotated[float, Field(gt=0, le=_MOST_S)] = 60.0


class AccessPoint(Part):
    """A shared medium: of n transfers under way each progresses at 1/n of the speed that it has alone.

    Attributes:
        half_duplex: whether downloads and uploads share it, too.
    """

    half_duplex: bool = False


class ServerLink(Part):
    """The server's own link. Where the transfers under way add up to more, all of one direction slow down alike."""

    down_mbps: Number | None = None
    up_mbps: Number | None = None

    @model_validator(mode="after")
    def _sane(self) -> ServerLink:
        for name in ("down_mbps", "up_mbps"):
            number: Number | None = getattr(self, name)
            if number is not None:
                check_range(name, number, "Mb/s", 1e-3, 1e9)
                _one(name, number)
        if self.down_mbps is None and self.up_mbps is None:
            raise ValueError("down_mbps or up_mbps must be given")
        return self
