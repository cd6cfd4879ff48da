"""Jobs in flight as arrays, so that a run goes on from the middle: what each was frozen with, and what came of it.

One row per job; adapters of versions that are still in flight once each; an update's tensors by its ticket. Guides (a
static criterion's scores) follow from the seed, objectives from the method and the version, and are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from fedsim.contracts.common import Outcome, State
from fedsim.contracts.learning import LocalRequest
from fedsim.contracts.program import LocalProgram, Objective, Phase
from fedsim.learn.adapter_arrays import adapter_from, adapter_state
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.train.importance import GroupScores
from fedsim.learn.train.jobs import Job, Remembered, Update
from fedsim.learn.train.objective import as_adapter, as_trained, remembering
from fedsim.structure import ModelShape, Structure

_PRESENT = 0
"""Number of the present version; the others are numbered as they are first met."""


@dataclass(frozen=True, eq=False)
class InFlight:
    """A job, and its update where it was trained already."""

    ticket: int
    job: Job
    update: Update | None


def flights_state(flights: Sequence[InFlight], present: Adapter, shape: ModelShape) -> State:
    """Arrays whose names begin with ``flights.``; rows in the order given."""
    jobs, trained = [one.job for one in flights], [one.update for one in flights if one.update is not None]
    older = {id(job.adapter): job.adapter for job in jobs if job.adapter is not present}
    numbers = {id(present): _PRESENT, **{key: number for number, key in enumerate(older, 1)}}
    arrays: dict[str, np.ndarray] = {}
    for key, adapter in older.items():
        arrays.update(adapter_state(adapter, f"version.{numbers[key]}."))
    arrays["tickets"] = np.array([one.ticket for one in flights], dtype=np.int64)
    arrays["trained"] = np.array([one.update is not None for one in flights])
    arrays["version"] = np.array([numbers[id(job.adapter)] for job in jobs], dtype=np.int64)
    for name in _REQUEST:
        arrays[f"request.{name}"] = np.array([getattr(job.request, name) for job in jobs])
    programs = list(dict.fromkeys(job.request.program for job in jobs))
    arrays["request.program"] = np.array([programs.index(job.request.program) for job in jobs], dtype=np.int64)
    for number, program in enumerate(programs):
        arrays[f"program.{number}"] = np.array([astuple(phase) for phase in program.phases], dtype=np.float64)
        arrays[f"program.{number}.objective"] = np.array([program.objective is not None])
    arrays["start"] = np.stack([_bits(job.start) for job in jobs])
    arrays["masked"] = np.array([job.mask is not None for job in jobs])
    arrays["mask"] = np.stack([_bits(job.mask or job.start) for job in jobs])
    _put_scores(arrays, "scores", [job.scores for job in jobs], shape)
    for name in _NUMBERS:
        arrays[f"update.{name}"] = np.array([getattr(update, name) for update in trained])
    if trained:
        arrays["update.structure"] = np.stack([_bits(update.structure) for update in trained])
        _put_scores(arrays, "update.scores", [update.scores for update in trained], shape)
    arrays["carries"] = np.array([job.carried is not None for job in jobs])
    for one in flights:
        if one.job.carried is not None:
            arrays.update(adapter_state(as_adapter(one.job.carried), f"carried.{one.ticket}."))
        if one.update is not None:
            arrays.update(adapter_state(one.update.adapter, f"update.{one.ticket}."))
            if one.update.remembered is not None:
                arrays.update(adapter_state(as_adapter(one.update.remembered.kept), f"kept.{one.ticket}."))
    return {f"flights.{name}": array for name, array in arrays.items()}


def flights_from(
    state: State,
    present: Adapter,
    shape: ModelShape,
    guide: Callable[[int], GroupScores | None],
    objective_at: Callable[[int], Objective | None],
) -> list[InFlight]:
    """What `flights_state` gave. Jobs of one version share its adapter again, those of the present one `present`.

    Args:
        objective_at: what the jobs of a version minimise beside their losses, where they minimise anything.
    """
    arrays = {name.removeprefix("flights."): array for name, array in state.items() if name.startswith("flights.")}
    adapters = {_PRESENT: present}
    for number in sorted(set(arrays["version"].tolist()) - {_PRESENT}):
        adapters[number] = adapter_from(arrays, present, f"version.{number}.")
    kept: list[InFlight] = []
    programs: dict[int, LocalProgram] = {}
    own_scores, done = _scores(arrays, "scores", shape), 0
    new_scores = _scores(arrays, "update.scores", shape) if arrays["trained"].any() else []
    for row, ticket in enumerate(arrays["tickets"].tolist()):
        values = {name: arrays[f"request.{name}"][row].item() for name in _REQUEST}
        number = int(arrays["request.program"][row])
        if number not in programs:
            programs[number] = _program(arrays, f"program.{number}", objective_at, values["version"])
        request = LocalRequest(**values, program=programs[number])
        adapter = adapters[int(arrays["version"][row])]
        mask = _structure(arrays["mask"][row], shape) if arrays["masked"][row] else None
        start = _structure(arrays["start"][row], shape)
        carries = bool(arrays["carries"][row])
        carried = as_trained(adapter_from(arrays, present, f"carried.{ticket}.")) if carries else None
        job = Job(request, adapter, start, own_scores[row], guide(request.client), mask, carried)
        update = None
        if arrays["trained"][row]:
            numbers = {name: arrays[f"update.{name}"][done].item() for name in _NUMBERS}
            update = Update(
                adapter=adapter_from(arrays, present, f"update.{ticket}."),
                structure=_structure(arrays["update.structure"][done], shape),
                scores=new_scores[done],
                start=adapter,
                remembered=_remembered(arrays, job, ticket, present),
                **{**numbers, "outcome": Outcome(numbers["outcome"])},
            )
            done += 1
        kept.append(InFlight(ticket, job, update))
    return kept


_REQUEST = tuple(field.name for field in fields(LocalRequest) if field.name != "program")
_NUMBERS = ("samples", "loss_before", "loss_after", "lora_importance", "outcome")
"""Numbers of an `Update`."""


def _remembered(arrays: State, job: Job, ticket: int, present: Adapter) -> Remembered | None:
    objective = remembering(job.request.program.objective)
    if objective is None or job.carried is None:
        return None
    return Remembered(objective, as_trained(adapter_from(arrays, present, f"kept.{ticket}.")))


def _program(arrays: State, name: str, objective_at: Callable[[int], Objective | None], version: int) -> LocalProgram:
    phases = tuple(
        Phase(int(steps), float(rate), bool(estimate), bool(cut_before), bool(trains))
        for steps, rate, estimate, cut_before, trains in arrays[name]
    )
    return LocalProgram(phases, objective_at(version) if arrays[f"{name}.objective"][0] else None)


def _bits(structure: Structure) -> np.ndarray:
    return np.packbits(np.concatenate([structure.head_mask, structure.channel_mask], axis=None))


def _structure(bits: np.ndarray, shape: ModelShape) -> Structure:
    heads = shape.layers * shape.head_groups
    flat = np.unpackbits(bits, count=heads + shape.layers * shape.ffn).astype(bool)
    return Structure(flat[:heads].reshape(shape.layers, -1), flat[heads:].reshape(shape.layers, -1))


def _put_scores(
    arrays: dict[str, np.ndarray], name: str, scores: Sequence[GroupScores | None], shape: ModelShape
) -> None:
    """Scores in float64, zeros where there are none, and where there are any."""
    filled = [one or GroupScores.zeros(shape) for one in scores]
    arrays[f"{name}.there"] = np.array([one is not None for one in scores])
    arrays[f"{name}.heads"] = np.stack([one.heads for one in filled])
    arrays[f"{name}.channels"] = np.stack([one.channels for one in filled])


def _scores(arrays: State, name: str, shape: ModelShape) -> list[GroupScores | None]:
    parts = (arrays[f"{name}.{part}"] for part in ("there", "heads", "channels"))
    return [GroupScores(heads, channels) if there else None for there, heads, channels in zip(*parts, strict=True)]
