"""FedScale's and FLASH's availability traces as rows ``client,start_s,end_s`` that a fleet file can name.

    python experiments/availability/convert.py fedscale client_behave_trace on.csv
    python experiments/availability/convert.py flash user_behavior_tiny.json on.csv

FedScale (https://github.com/SymbioticLab/FedScale, Lai et al., ICML 2022) pickles a mapping from client to
``{"active": [seconds], "inactive": [seconds], "finish_time": seconds, ...}``: a client is there from each active time
to the inactive time of the same place, and the trace begins anew after ``finish_time`` (as its ``client_manager`` reads
it). A pickle may run any code; this one is read by an unpickler that builds dictionaries, lists, numbers and texts and
refuses everything else. FLASH (https://github.com/PKU-Chengxu/FLASH, Yang et al., WWW 2021) has JSON: by client,
``messages``, lines of ``YYYY-MM-DD HH:MM:SS<tab>state``: a client is there while its screen is off, it is charging and
it is on Wi-Fi. Both traces have terms of their own: cite their authors; nothing of them travels with this package.
"""

from __future__ import annotations

import argparse
import csv
import json
import pickle
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

Stretch = tuple[str, float, float]


class PlainUnpickler(pickle.Unpickler):
    """Builds what needs no import: dictionaries, lists, tuples, sets, numbers, texts."""

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is looked up."""
        raise pickle.UnpicklingError(f"the file wants {module}.{name}, which is no plain data: it is not read")


def fedscale_stretches(path: Path) -> Iterator[Stretch]:
    """Stretches of FedScale's trace, by client."""
    with path.open("rb") as stream:
        clients = PlainUnpickler(stream).load()
    if not isinstance(clients, dict):
        raise ValueError(f"{path}: a mapping from client to its times is needed")
    for client, trace in clients.items():
        for start_s, end_s in zip(trace["active"], trace["inactive"], strict=False):
            if end_s > start_s:
                yield str(client), float(start_s), float(end_s)


def flash_stretches(path: Path) -> Iterator[Stretch]:
    """Stretches of FLASH's trace, by client; seconds from the first message of all."""
    with path.open(encoding="utf-8") as stream:
        clients = json.load(stream)
    read = {client: _messages(one["messages"]) for client, one in clients.items()}
    times = [when for messages in read.values() for when, _ in messages]
    if not times:
        raise ValueError(f"{path}: no client has a message")
    zero = min(times)
    for client, messages in read.items():
        screen_off = charging = wifi = False
        began: datetime | None = None
        for when, state in messages:
            if state in ("screen_off", "screen_lock"):
                screen_off = True
            elif state in ("screen_on", "screen_unlock"):
                screen_off = False
            elif state in ("battery_charged_on", "battery_charged_off"):
                charging = state.endswith("_on")
            elif state == "wifi" or state in ("2g", "3g", "4g", "unknown"):
                wifi = state == "wifi"
            there = screen_off and charging and wifi
            if there and began is None:
                began = when
            elif not there and began is not None:
                if when > began:
                    yield client, (began - zero).total_seconds(), (when - zero).total_seconds()
                began = None


def _messages(text: str) -> list[tuple[datetime, str]]:
    found = []
    for line in text.splitlines():
        when, tab, state = line.strip().partition("\t")
        if tab:
            found.append((datetime.strptime(when.strip(), "%Y-%m-%d %H:%M:%S"), state.strip().lower()))
    return sorted(found, key=lambda one: one[0])


FORMATS = {"fedscale": fedscale_stretches, "flash": flash_stretches}


def convert(kind: str, source: Path, target: Path) -> int:
    """Write the stretches; how many."""
    rows = list(FORMATS[kind](source))
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("client", "start_s", "end_s"))
        writer.writerows(rows)
    return len(rows)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(FORMATS))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    try:
        count = convert(given.kind, given.source, given.target)
    except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        print(f"error: {given.source}: {error}", file=sys.stderr)
        return 2
    print(f"{count} stretches written to {given.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
