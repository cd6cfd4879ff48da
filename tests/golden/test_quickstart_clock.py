"""Golden values of the simulated clock: a change of them is a change of every result, and needs a reason.

Made by ``run = fedsim.run("quickstart", method=method, out=..., **OVERRIDES)`` and
``(run.manifest["simulated_s"], run.rounds["idle_fraction"].mean(), run.rounds["energy_j"].sum())``.

Energies changed once (by 5 to 8%; no time did): the idle watts of Xavier NX and AGX Xavier are measured ones now.
"""

from __future__ import annotations

import pytest

import fedsim

OVERRIDES = {
    "train.engine": "none",
    "server.rounds": 8,
    "prune.warmup_rounds": 2,
    "prune.end_round": 6,
    "records.events": False,
}
GOLDEN = {
    "fedspine": (101.96658506928239, 0.41703174733996407, 62101.583587945264),
    "fedspine_uniform": (75.32848070531593, 0.20893662358219123, 51988.29932514632),
    "fedspine_balanced": (54.91744728566869, 0.149875879519407, 42087.14271541037),
    "fedlora": (88.75075148990797, 0.2041867762949867, 62308.79647819946),
}


@pytest.mark.parametrize("method", ["fedspine", "fedspine_uniform", "fedspine_balanced", "fedlora"])
def test_the_clock_of_the_quickstart(method, tmp_path):
    run = fedsim.run("quickstart", method=method, out=tmp_path / "run", quiet=True, **OVERRIDES)
    measured = (
        run.manifest["simulated_s"],
        run.rounds["idle_fraction"].mean(),
        run.rounds["energy_j"].sum(),
    )
    assert measured == pytest.approx(GOLDEN[method], rel=1e-9)
