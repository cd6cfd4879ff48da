"""Learning what a device's time consists of, from the times of its own rounds: T = a FLOPs + b bytes + c.

[ours] Recursive least squares with exponential forgetting, one 3 x 3 covariance per client, all clients at once.
FLOPs are counted in tera and bytes in mega, so that the three parameters are of similar size. Nothing here knows a
device profile: what it needs is what each job asked, and how long it took.
"""

from __future__ import annotations

import numpy as np

from fedsim.contracts.common import FloatArray, IntArray, State
from fedsim.contracts.control import Work
from fedsim.state import take

TERA = 1e12
MEGA = 1e6
FORGETTING = 0.95
JUMP_ERROR = 0.25
"""A relative error above this means a new power mode or link."""
CAUTION_SIGMAS = 2.0
_SURPRISE_SIGMAS = 4.0
_JUMP_LEAST_SHARE = 0.05
_UNHEARD = np.array([1.0, 0.0, 0.0])
_FIRST_SHARES = np.array([0.8, 0.1, 0.1])
_FIRST_SPREAD = np.array([0.5, 0.3, 0.2])
_FIRST_NOISE = 0.03
_LEAST_NOISE = 0.01
_NOISE_STEP = 0.1
_NOISE_CLIP_SIGMAS = 3.0
_CONSTANT_SHARE = 0.1
_CONSTANT_SPREAD = 0.1
"""What is believed of c before it shows: its share of a device's time, and how far off that may be."""


def features(work: Work) -> FloatArray:
    """(tera-FLOPs, megabytes of traffic, 1), stacked on a new last axis."""
    tera_flops, megabytes = _asked(work)
    return np.stack([tera_flops, megabytes, np.ones_like(tera_flops)], axis=-1)


def _asked(work: Work) -> tuple[FloatArray, FloatArray]:
    """Tera-FLOPs and megabytes of traffic, of one shape."""
    tera_flops = np.asarray(work.flops, dtype=np.float64) / TERA
    traffic = np.asarray(work.download_bytes, dtype=np.float64) + np.asarray(work.upload_bytes, dtype=np.float64)
    tera_flops, megabytes = np.broadcast_arrays(tera_flops, traffic / MEGA)
    return tera_flops, megabytes


def _columns(values: FloatArray, dimensions: int) -> tuple[FloatArray, ...]:
    """Columns of a (P, K) array, with trailing axes of length 1 so that they broadcast to `dimensions` axes."""
    shape = (values.shape[0], *(1,) * (dimensions - 1))
    return tuple(column.reshape(shape) for column in values.T)


class TimeModel:
    """Estimates of (a, b, c) for every client; ``a`` s per tera-FLOP, ``b`` s per megabyte, ``c`` s; none negative."""

    def __init__(self, clients: int) -> None:
        self._theta = np.zeros((clients, 3))
        self._covariance = np.zeros((clients, 3, 3))
        self._prior_variance = np.zeros((clients, 3))
        self._noise_variance = np.full(clients, _FIRST_NOISE**2)
        self.observations = np.zeros(clients, dtype=np.int64)
        self._medians: FloatArray | None = None

    def parameters(self, clients: IntArray) -> FloatArray:
        """(a, b, c) of each client, shape (P, 3); the fleet's medians for a client never heard of.

        Before anything at all was heard every device counts as equally fast (1 s per tera-FLOP).
        """
        seen = self.observations[clients] > 0
        theta = self._theta[clients]
        if not seen.all():
            theta[~seen] = self._of_the_unknown()
        return theta

    def _of_the_unknown(self) -> FloatArray:
        """Medians over all clients heard of, taken once between two updates."""
        if self._medians is None:
            seen = self.observations > 0
            self._medians = np.median(self._theta[seen], axis=0) if seen.any() else _UNHEARD
        return self._medians

    def predict(self, clients: IntArray, work: Work) -> FloatArray:
        """Expected seconds; work (P,), (P, K) or (1, K) for all alike -> (P,) or (P, K)."""
        tera_flops, megabytes = _asked(work)
        a, b, c = _columns(self.parameters(clients), tera_flops.ndim)
        # Term by term: a matrix product might round one client's row otherwise than another's.
        return np.asarray(a * tera_flops + b * megabytes + c)

    def cautious(self, clients: IntArray, work: Work) -> FloatArray:
        """Expected seconds plus two standard deviations, of what was learned and of the client's own noise."""
        expected = self.predict(clients, work)
        tera_flops, megabytes = _asked(work)
        covariance = self._covariance[clients].reshape(-1, 9)[:, [0, 4, 8, 1, 2, 5]]
        aa, bb, cc, ab, ac, bc = _columns(covariance, tera_flops.ndim)
        doubt = (
            tera_flops * (aa * tera_flops + 2.0 * (ab * megabytes + ac)) + megabytes * (bb * megabytes + 2.0 * bc) + cc
        )
        (noise,) = _columns(self._noise_variance[clients, None], tera_flops.ndim)
        return expected + CAUTION_SIGMAS * np.sqrt(np.maximum(doubt, 0.0) + noise * expected**2)

    def update(self, clients: IntArray, work: Work, time_s: FloatArray) -> None:
        """Learn from measured times.

        Args:
            clients: distinct ids, shape (P,).
            work: what each job asked, shape (P,).
            time_s: positive seconds, (P,).
        """
        if clients.size == 0:
            return
        phi = features(work)
        self._begin(clients, phi, time_s)
        theta, covariance = self._theta[clients], self._covariance[clients]
        expected = np.einsum("pk,pk->p", phi, theta)
        error = np.abs(time_s - expected) / np.maximum(expected, 1e-12)
        sigma = np.sqrt(self._noise_variance[clients])
        # A jump rescales the parameters at once: each may be off by its whole size, so that one observation carries
        # the estimate to the new time, and the larger part of the time takes the larger part of the blame.
        # A smaller surprise, but beyond the client's noise, is doubted in proportion.
        surprised = error > _SURPRISE_SIGMAS * sigma
        trust_lost = np.where(surprised, np.minimum(1.0, error / JUMP_ERROR), 0.0)
        least = _JUMP_LEAST_SHARE * expected[:, None] / np.maximum(phi, 1e-12)
        doubt = trust_lost[:, None] * np.maximum(theta, least)
        prior_variance = self._prior_variance[clients]
        covariance = _capped(covariance / FORGETTING, prior_variance)
        covariance[:, np.arange(3), np.arange(3)] += doubt**2
        self._prior_variance[clients] = np.maximum(prior_variance, (doubt * _FIRST_SPREAD) ** 2)
        noise = np.maximum(_LEAST_NOISE, sigma) * np.maximum(expected, 1e-12)
        theta, covariance = _observe(theta, covariance, phi, time_s, noise**2)
        # A device that does much the same round after round cannot tell its constant from its compute. What was
        # learned is forgotten, so the belief that the constant is a small part of the time is renewed each round,
        # with the weight that forgetting takes away.
        constant = np.broadcast_to(np.array([0.0, 0.0, 1.0]), phi.shape)
        believed_variance = (_CONSTANT_SPREAD * time_s) ** 2 / (1.0 - FORGETTING)
        theta, covariance = _observe(theta, covariance, constant, _CONSTANT_SHARE * time_s, believed_variance)
        self._theta[clients] = _non_negative(theta, covariance)
        self._covariance[clients] = covariance
        # Held at three sigma, a lasting noise is learned within rounds, and one jump hardly counts as noise.
        surprise = np.minimum(error, _NOISE_CLIP_SIGMAS * sigma) ** 2
        self._noise_variance[clients] += _NOISE_STEP * (surprise - self._noise_variance[clients])
        self.observations[clients] += 1
        self._medians = None

    def _begin(self, clients: IntArray, phi: FloatArray, time_s: FloatArray) -> None:
        """Give first-seen clients a prior: the fleet's medians scaled to their time, or mostly compute."""
        first = self.observations[clients] == 0
        if not first.any():
            return
        ids, phi, time_s = clients[first], phi[first], time_s[first]
        asked = np.maximum(phi, 1e-12)
        if (self.observations > 0).any():
            guess = self.parameters(ids)
            theta = guess * (time_s / np.maximum((guess * phi).sum(axis=1), 1e-12))[:, None]
        else:
            theta = _FIRST_SHARES * time_s[:, None] / asked
        self._theta[ids] = theta
        variance = (_FIRST_SPREAD * time_s[:, None] / asked) ** 2
        self._prior_variance[ids] = variance
        self._covariance[ids] = variance[:, :, None] * np.eye(3)

    def state(self) -> State:
        """Arrays for the checkpoint."""
        return {
            "theta": self._theta.copy(),
            "covariance": self._covariance.copy(),
            "prior_variance": self._prior_variance.copy(),
            "noise_variance": self._noise_variance.copy(),
            "observations": self.observations.copy(),
        }

    def restore(self, state: State) -> None:
        """Take the arrays of a checkpoint. Raises RunError where they do not fit."""
        self._theta = take(state, "theta", self._theta)
        self._covariance = take(state, "covariance", self._covariance)
        self._prior_variance = take(state, "prior_variance", self._prior_variance)
        self._noise_variance = take(state, "noise_variance", self._noise_variance)
        self.observations = take(state, "observations", self.observations)
        self._medians = None


def _observe(
    theta: FloatArray, covariance: FloatArray, phi: FloatArray, value: FloatArray, noise_variance: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """One least-squares step per client: ``value = phi . theta`` was seen with this noise."""
    carried = np.einsum("pjk,pk->pj", covariance, phi)
    gain = carried / (np.einsum("pk,pk->p", phi, carried) + noise_variance)[:, None]
    theta = theta + gain * (value - np.einsum("pk,pk->p", phi, theta))[:, None]
    covariance = covariance - gain[:, :, None] * carried[:, None, :]
    return theta, 0.5 * (covariance + covariance.transpose(0, 2, 1))


def _capped(covariance: FloatArray, prior_variance: FloatArray) -> FloatArray:
    """Shrink directions whose variance has outgrown the prior's: forgetting without excitation must not run away."""
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    shrink = np.sqrt(np.minimum(1.0, prior_variance / np.maximum(variance, 1e-300)))
    return covariance * shrink[:, :, None] * shrink[:, None, :]


def _non_negative(theta: FloatArray, covariance: FloatArray) -> FloatArray:
    """Condition the estimate on its negative parameters being zero, the worst first, so that the fit stays best."""
    theta, covariance = theta.copy(), covariance.copy()
    for _ in range(theta.shape[1] - 1):
        deviation = np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 1e-300))
        worst = np.where(theta < 0, theta / deviation, 0.0).argmin(axis=1)
        rows = np.flatnonzero(theta[np.arange(theta.shape[0]), worst] < 0)
        if rows.size == 0:
            break
        axis = worst[rows]
        column = covariance[rows, :, axis]
        ratio = column / np.maximum(column[np.arange(rows.size), axis], 1e-300)[:, None]
        theta[rows] -= ratio * theta[rows, axis][:, None]
        theta[rows, axis] = 0.0
        covariance[rows] -= ratio[:, :, None] * column[:, None, :]
    return np.maximum(theta, 0.0)
