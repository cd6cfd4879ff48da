"""What of a fleet changes in time, as arrays and curves; nothing where the fleet file says nothing.

Every draw is a function of the run's seed, of the client and of its own count (of stretches, flights, periods), so that
other clients' coming and going changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.errors import ConfigError, ProfileError, unknown
from fedsim.fleet.availability_file import read_availability
from fedsim.fleet.bandwidth import Curve, Replays, Roams, read_traces
from fedsim.fleet.fleet_file import FleetFile
from fedsim.fleet.heat import HeatTable
from fedsim.fleet.number import Number
from fedsim.fleet.presence import Always, DailyRhythm, OnOffRhythm, Presence, Rhythm
from fedsim.fleet.world_file import Daily, OnOff
from fedsim.places import user_path
from fedsim.rng import Stream, uniforms

NO_DROP = -1


@dataclass(frozen=True, eq=False)
class Sharing:
    """Which transfers meet.

    Attributes:
        point_of: each client's access point, shape (clients,); -1: a link to itself.
        half_duplex: of each access point.
        down_bits_per_s, up_bits_per_s: what the server sends and receives at most; infinite where it is not said.
    """

    point_of: IntArray
    half_duplex: tuple[bool, ...]
    down_bits_per_s: float
    up_bits_per_s: float


@dataclass(frozen=True, eq=False)
class Dynamics:
    """What changes; None or empty where nothing does.

    Attributes:
        said: the fleet file's keys that make clients meet, drop or change, for a sentence.
        drop_chance: per flight and phase, shape (3,).
        newcomers: mask (clients,) of those that join after the start.
    """

    said: tuple[str, ...] = ()
    presence: Presence | None = None
    drop_chance: FloatArray = field(default_factory=lambda: np.zeros(3))
    heat: HeatTable | None = None
    mode_period_s: float | None = None
    curve: Curve | None = None
    sharing: Sharing | None = None
    newcomers: np.ndarray | None = None

    def drops(self, seed: int, clients: IntArray, flight: IntArray) -> tuple[IntArray, FloatArray]:
        """In which phase each flight is lost (`NO_DROP`: in none), and after which share of it, shape (P,) each."""
        phase = np.full(len(clients), NO_DROP, dtype=np.int64)
        share = np.ones(len(clients))
        for place in np.flatnonzero(self.drop_chance)[::-1].tolist():
            lost = uniforms(seed, Stream.DROPOUT, clients, place, flight) < self.drop_chance[place]
            phase[lost] = place
        lost = phase != NO_DROP
        share[lost] = uniforms(seed, Stream.DROPOUT, clients[lost], 3, flight[lost])
        return phase, share


def check_arrays(dynamics: Dynamics) -> None:
    """Refuse ``server.clock: arrays`` where clients meet, drop or change.

    Raises:
        ConfigError: naming what the fleet file says.
    """
    if dynamics.said:
        raise ConfigError(
            "server.clock: value 'arrays' is not allowed with a fleet whose clients meet, drop or change (it says: "
            f"{', '.join(dynamics.said)}; allowed: auto or processes)"
        )


def dynamics_of(
    spec: FleetFile, path: Path, clients: int, line_of: IntArray, first_link: IntArray, seed: int
) -> Dynamics:
    """The changes that a fleet file asks for.

    Args:
        path: of the fleet file, beside which its own files are found.
        line_of, first_link: each client's line and link, shape (clients,).
    Raises:
        ProfileError: one sentence naming the field, the value and what is allowed.
    """
    said = tuple(
        key
        for key in ("availability", "dropout", "throttle", "replay", "roaming", "access_points", "server_link")
        if getattr(spec, key)
    )
    everyone = np.arange(clients, dtype=np.int64)

    def drawn(number: Number, key: int) -> FloatArray:
        if number.draw == "fixed":
            return np.full(clients, number.value)
        return number.low + (number.high - number.low) * uniforms(seed, Stream.MEMBERSHIP, everyone, key)

    presence, newcomers = _presence(spec, path, clients, line_of, seed, drawn)
    membership = any(device.join_s is not None or device.leave_s is not None for device in spec.devices)
    if membership:
        said = (*said, "join_s or leave_s")
    if spec.mode_period_s is not None:
        said = (*said, "mode_period_s")
    dropout = spec.dropout
    chance = [0.0] * 3 if dropout is None else [dropout.download.value, dropout.compute.value, dropout.upload.value]
    throttle = spec.throttle
    return Dynamics(
        said=said,
        presence=presence,
        drop_chance=np.array(chance),
        heat=None
        if throttle is None
        else HeatTable.of([(step.after_busy_s, step.rate) for step in throttle.steps], throttle.recover_s),
        mode_period_s=None if spec.mode_period_s is None else spec.mode_period_s.value,
        curve=_curve(spec, path, everyone, first_link, seed),
        sharing=_sharing(spec, path, everyone, line_of),
        newcomers=newcomers,
    )


def _presence(
    spec: FleetFile, path: Path, clients: int, line_of: IntArray, seed: int, drawn: Callable[[Number, int], FloatArray]
) -> tuple[Presence | None, np.ndarray | None]:
    rule = spec.availability
    join_s, leave_s = np.zeros(clients), np.full(clients, np.inf)
    for line, device in enumerate(spec.pattern):
        here = line_of == line
        if device.join_s is not None:
            join_s[here] = drawn(device.join_s, 10)[here]
        if device.leave_s is not None:
            leave_s[here] = drawn(device.leave_s, 11)[here]
    moves = bool((join_s > 0).any() or np.isfinite(leave_s).any())
    if rule is None and not moves:
        return None, None
    never = join_s >= leave_s
    if never.any():
        client = int(np.argmax(never))
        raise ProfileError(
            f"fleet file '{path}': client {client} joins at {join_s[client]:g} s and leaves at {leave_s[client]:g} s, "
            "so that it is never there (allowed: leave_s after join_s)"
        )
    rhythm: Rhythm
    if rule is None:
        rhythm = Always()
    elif isinstance(rule, OnOff):
        rhythm = OnOffRhythm(drawn(rule.mean_on_s, 0), drawn(rule.mean_off_s, 1), seed)
    elif isinstance(rule, Daily):
        period_s, start_s, on_s, spread_s = (
            drawn(number, key) for key, number in enumerate((rule.period_s, rule.start_s, rule.on_s, rule.spread_s), 2)
        )
        rhythm = DailyRhythm(period_s, start_s, on_s, spread_s, seed)
    else:
        rhythm = read_availability(_beside(path, rule.file), rule.repeat_s)
    return Presence(rhythm, join_s, leave_s), join_s > 0


def _beside(path: Path, name: str) -> Path:
    """A file that a fleet file names: beside it, unless its place is written out."""
    return path.parent / user_path(name)


def _curve(spec: FleetFile, path: Path, everyone: IntArray, first_link: IntArray, seed: int) -> Curve | None:
    if spec.roaming is not None:
        ends = [_each(spec, name, everyone, seed) for name in ("down_mbps", "up_mbps")]
        down, up = (rates / rates[everyone, first_link][:, None] for rates in ends)
        return Roams(spec.roaming.mean_stay_s.value, first_link, down, up, seed)
    replay = spec.replay
    if replay is None:
        return None
    traces = read_traces(_beside(path, replay.folder), replay.floor, replay.max_gap_s)
    drawn, offset = (uniforms(seed, Stream.LINK_TRACE, everyone, key) for key in range(2))
    trace_of = np.minimum((drawn * len(traces)).astype(np.int64), len(traces) - 1)
    follows = np.array([replay.links is None or name in replay.links for name in spec.links])[first_link]
    return Replays(traces, np.where(follows, trace_of, -1), offset)


def _each(spec: FleetFile, name: str, everyone: IntArray, seed: int) -> FloatArray:
    """A bandwidth that each client would have on each kind of link, shape (clients, links): its draw as at its own."""
    key = ("down_mbps", "up_mbps").index(name)
    draws = uniforms(seed, Stream.LINK_MEAN, everyone, key)
    columns = []
    for kind in spec.links.values():
        number: Number = getattr(kind, name)
        spread = number.high - number.low if number.draw == "uniform" else 0.0
        columns.append((number.low if number.draw == "uniform" else number.value) + spread * draws)
    return np.stack(columns, axis=1)


def _sharing(spec: FleetFile, path: Path, everyone: IntArray, line_of: IntArray) -> Sharing | None:
    points = list(spec.access_points)
    server = spec.server_link
    if not points and server is None:
        return None
    named = [device.access_point for device in spec.pattern]
    for name in named:
        if name is not None and name not in points:
            raise ProfileError(f"fleet file '{path}': {unknown('access point', name, points)}")
    if points and all(name is None for name in named):
        point_of = (everyone // len(named)) % len(points)  # in turn, by pass over the devices
    else:
        point_of = np.array([-1 if name is None else points.index(name) for name in named], dtype=np.int64)[line_of]
    empty = [name for number, name in enumerate(points) if not (point_of == number).any()]
    if empty:
        raise ProfileError(
            f"fleet file '{path}': the access point '{empty[0]}' has no members among {len(everyone)} clients "
            "(allowed: devices that name it with access_point, or no names at all: then each pass has the next)"
        )
    down = server.down_mbps if server else None
    up = server.up_mbps if server else None
    return Sharing(
        point_of=point_of.astype(np.int64),
        half_duplex=tuple(point.half_duplex for point in spec.access_points.values()),
        down_bits_per_s=np.inf if down is None else 1e6 * down.value,
        up_bits_per_s=np.inf if up is None else 1e6 * up.value,
    )
