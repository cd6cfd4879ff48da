"""FedAdam: FedIT whose server takes the mean difference as a gradient, and answers with a step of Adam.

Source: Adaptive Federated Optimization, arXiv 2003.00295, algorithm 2: with D the clients' mean difference,
``m = beta1 m + (1 - beta1) D``, ``v = beta2 v + (1 - beta2) D^2``, ``x = x + eta m / (sqrt(v) + tau)``, entry by entry
and without a correction of the bias; m and v start at zero.

Deviations: x is LoRA's factors and the head; clients run AdamW, as for all methods, where the paper's run SGD, and are
weighted by data. The paper starts v at tau^2 or above; zero is below it, and tau alone bounds the first steps.
Unspecified in the paper for LoRA; we chose: eta 0.001, near what a mean difference measures here (one step moves an
entry by about eta, whatever its difference), beta1 0.9, beta2 0.99 and tau 0.001, which are the paper's.

The server's arithmetic takes no simulated time, as no rule's does; clients do, send and receive what FedIT's do.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedsim.contracts.common import State
from fedsim.contracts.program import Tensor
from fedsim.contracts.server_optimizer import ServerOptimizer
from fedsim.methods.base import Method
from fedsim.settings import Config, PositiveFloat, Section

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Options(Section):
    """``server_rate`` is eta, ``adaptivity`` tau."""

    server_rate: PositiveFloat = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    adaptivity: PositiveFloat = 1e-3


class ServerAdam:
    """Adam over mean differences. Moments are held by the tensor's name."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._restored: State = {}

    def __call__(self, name: str, difference: Tensor) -> Tensor:
        """The step, of the shape of `difference`."""
        own = self._options
        first, second = self._known(name, difference)
        first = own.beta1 * first + (1.0 - own.beta1) * difference
        second = own.beta2 * second + (1.0 - own.beta2) * difference**2
        self._moments[name] = first, second
        return own.server_rate * first / (second.sqrt() + own.adaptivity)

    def state(self) -> State:
        """Both moments of every tensor."""
        arrays = dict(self._restored)  # of tensors that were not merged since
        for name, pair in self._moments.items():
            for which, moment in zip(("first", "second"), pair, strict=True):
                arrays[f"{which}.{name}"] = moment.cpu().numpy()
        return arrays

    def restore(self, state: State) -> None:
        """Take what `state` gave; the arrays go to a device with the first merge."""
        self._moments, self._restored = {}, {name: np.array(array) for name, array in state.items()}

    def _known(self, name: str, difference: Tensor) -> tuple[Tensor, Tensor]:
        if name in self._moments:
            return self._moments[name]
        zeros = np.zeros(1, dtype=np.float32)
        first, second = (self._restored.get(f"{which}.{name}", zeros) for which in ("first", "second"))
        return difference.new_tensor(first), difference.new_tensor(second)


def server_optimizer(config: Config) -> ServerOptimizer:
    """Adam, as the options say."""
    return ServerAdam(Options.model_validate(config.method_options))


METHOD = Method(
    name="fedadam",
    summary="LoRA of one rank, mean difference of the factors as the gradient of a server's Adam (FedAdam)",
    sources=("Adaptive Federated Optimization, arXiv 2003.00295", "FedIT, arXiv 2305.05644"),
    prunes=False,
    defaults={"control.policy": "uniform", "aggregate.rule": "average_factors"},
    options=Options,
    server_optimizer=server_optimizer,
)
