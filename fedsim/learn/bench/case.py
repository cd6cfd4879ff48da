"""What is trained in one comparison of engines: the cohort's size, its sentences and its structures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.learn.model.linears import Targets
from fedsim.learn.train.batches import EncodedText
from fedsim.learn.train.jobs import ClientData
from fedsim.rng import Stream, generator

_SHORTEST = 4
_SEED = 5


@dataclass(frozen=True)
class EngineCase:
    """One comparison.

    Attributes:
        model: as ``model.name``.
        clients: of the round.
        length: tokens of a sentence; of the longest where `ragged`.
        ragged: lengths as in text: gamma distributed (shape 3), a third of `length` in the mean, cut to 4 .. `length`.
        ratio: pruning ratio of the clients' random structures, each its own; 0: unpruned.
        importance: estimate LoRA-guided importance on every step.
    """

    name: str
    model: str
    clients: int
    targets: Targets
    local_steps: int
    batch_size: int
    length: int
    rank: int = 8
    pooling: str = "native"
    ragged: bool = False
    ratio: float = 0.0
    importance: bool = False

    @property
    def seed(self) -> int:
        """Root seed of data, batches and structures."""
        return _SEED

    def data(self, vocab: int, pad_token: int) -> ClientData:
        """Random sentences with random labels, eight batches a client."""
        count = 8 * self.batch_size * self.clients
        draw = generator(self.seed, Stream.CORPUS)
        lengths = np.full(count, self.length)
        if self.ragged:
            drawn = draw.gamma(3.0, self.length / 9.0, size=count)
            lengths = np.clip(np.rint(drawn).astype(np.int64), min(_SHORTEST, self.length), self.length)
        ids = draw.integers(5, vocab, size=(count, self.length)).astype(np.int32)
        ids[np.arange(self.length) >= lengths[:, None]] = pad_token
        text = EncodedText(ids, lengths, draw.integers(0, 2, size=count), None)
        return ClientData(text, tuple(np.split(np.arange(count), self.clients)))
