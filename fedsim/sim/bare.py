"""What SimPy alone takes: the yardstick of `fedsim bench` for the simulator."""

from __future__ import annotations

from collections.abc import Generator

import simpy

from fedsim.sim.trips import PHASES


def play_bare_timeouts(clients: int, rounds: int) -> tuple[int, float]:
    """A process per client and round that waits three times, and nothing else.

    Returns:
        How many timeouts were waited for, and the clock at the end in seconds (each timeout takes one).
    """
    env = simpy.Environment()
    waited = 0

    def client() -> Generator[simpy.Event, object, None]:
        nonlocal waited
        for _ in range(PHASES):
            yield env.timeout(1.0)
            waited += 1

    def server() -> Generator[simpy.Event, object, None]:
        for _ in range(rounds):
            yield env.all_of([env.process(client()) for _ in range(clients)])

    env.run(until=env.process(server()))
    return waited, float(env.now)
