"""The records: columns as the contract names them, phases from timestamps, and parts that survive a kill."""

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import Block, config_of, one_round, write_run

from fedsim.contracts.common import Labels, Outcome
from fedsim.contracts.control import Rewards, Work
from fedsim.contracts.flights import Arrivals, Flights, Learned
from fedsim.errors import RunError
from fedsim.records import writer as records
from fedsim.records.columns import glossary_markdown
from fedsim.records.folder import RunDirectory
from fedsim.records.writer import RecordWriter, client_round_rows, list_parts, round_row
from fedsim.settings import RecordSettings

# The contract, written out a second time on purpose.
CONTRACT = {
    "rounds": "round start_s end_s duration_s idle_fraction participants dropped bytes_down bytes_up energy_j "
    "prune_ratio_mean lora_rank_mean accuracy loss accuracy_consensus host_s",
    "client_rounds": "round flight client version staleness dispatch_s device mode ratio_before prune_ratio "
    "prune_ratio_target lora_rank local_steps wait_s download_s compute_s upload_s idle_s bytes_down bytes_up energy_j "
    "peak_memory_bytes outcome loss_before loss_after lora_importance reward_loss reward_progress reward_importance "
    "reward_time reward",
    "events": "time_s round client event value",
}


def three_clients(**changes):
    """A round of clients 2, 5, 7 from 10 s to 20 s: one ok, one late (cut in upload), one dropped in download."""
    count = 3
    work = Work(*(np.full(count, float(value)) for value in range(1, 7)))
    flights = Flights(
        flight=np.array([3, 0, 1]),
        clients=np.array([2, 5, 7]),
        version=np.array([4, 4, 2]),
        dispatch_s=np.array([10.0, 10.0, 9.5]),
        ratio_before=np.array([0.05, 0.15, 0.25]),
        ratio_asked=np.array([0.1, 0.2, 0.3]),
        rank=np.array([2, 4, 16]),
        steps=np.array([10, 20, 30]),
        work=work,
        ticket=np.zeros(count, dtype=np.int64),
    )
    outcome = np.array([Outcome.OK, Outcome.LATE, Outcome.DROPPED])
    arrivals = Arrivals(
        merge_index=4,
        start_s=10.0,
        end_s=20.0,
        flights=flights,
        device=Labels(np.array([0, 1, 1]), np.array(["a", "b"])),
        mode=Labels(np.array([0, 0, 1]), np.array(["m", "n"])),
        download_start_s=np.array([10.5, 11.0, 10.0]),
        download_end_s=np.array([12.0, 12.0, 13.0]),
        compute_end_s=np.array([15.0, 19.0, 13.0]),
        upload_end_s=np.array([16.0, 20.0, 13.0]),
        released_s=np.full(count, 20.0),
        bytes_down=np.array([100.0, 100.0, 30.5]),
        bytes_up=np.array([50.0, 20.0, 0.0]),
        energy_joules=np.array([7.0, 8.0, 9.0]),
        outcome=outcome,
    )
    learned = Learned(
        ratio=np.array([0.125, np.nan, np.nan]),
        loss_before=np.array([0.7, np.nan, np.nan]),
        loss_after=np.array([0.6, np.nan, np.nan]),
        lora_importance=np.array([3.5, np.nan, np.nan]),
        rewards=Rewards(*(np.array([value, np.nan, np.nan]) for value in (0.5, 0.1, 0.2, 0.3, 0.4))),
        outcome=outcome,
        accuracy=None,
        loss=None,
        accuracy_consensus=None,
    )
    return dataclasses.replace(arrivals, **changes), learned


def test_names_and_order_are_those_of_the_contract():
    assert {table: [column.name for column in columns] for table, columns in records.TABLES.items()} == {
        table: names.split() for table, names in CONTRACT.items()
    }
    arrivals, learned = three_clients()
    assert client_round_rows(arrivals, learned).column_names == CONTRACT["client_rounds"].split()
    assert round_row(arrivals, learned, 0.5).column_names == CONTRACT["rounds"].split()


def test_every_column_says_its_unit_and_meaning_in_the_glossary_and_in_the_file(tmp_path):
    glossary = glossary_markdown()
    path = write_run(tmp_path / "run", rounds=2, clients=8)
    for table, columns in records.TABLES.items():
        schema = pq.read_schema(path / f"{table}.parquet")
        for column in columns:
            assert column.meaning
            assert (column.unit == "s") == column.name.endswith("_s")
            assert f"| `{column.name}` | {column.dtype} | {column.unit} | {column.meaning} |" in glossary
            field = schema.field(column.name)
            assert field.metadata == {b"unit": column.unit.encode(), b"meaning": column.meaning.encode()}
            assert str(field.type) == {"float64": "double"}.get(column.dtype, column.dtype)


def test_client_rows_by_hand():
    rows = client_round_rows(*three_clients()).to_pydict()
    assert rows["round"] == [4, 4, 4]
    assert rows["client"] == [2, 5, 7]
    assert rows["wait_s"] == [0.5, 1.0, 0.5]
    assert rows["download_s"] == [1.5, 1.0, 3.0]
    assert rows["compute_s"] == [3.0, 7.0, 0.0]
    assert rows["upload_s"] == [1.0, 1.0, 0.0]
    assert rows["idle_s"] == [4.0, 0.0, 7.0]
    assert rows["prune_ratio"] == [0.125, None, None]
    assert rows["prune_ratio_target"] == [0.1, 0.2, 0.3]
    assert rows["lora_rank"] == [2, 4, 16]
    assert rows["bytes_down"] == [100.0, 100.0, 30.5]
    assert rows["peak_memory_bytes"] == [4.0, 4.0, 4.0]
    assert rows["outcome"] == ["ok", "late", "dropped"]
    assert rows["loss_before"] == [0.7, None, None]
    assert rows["flight"] == [3, 0, 1]
    assert rows["version"] == [4, 4, 2]
    assert rows["staleness"] == [0, 0, 2]
    assert rows["dispatch_s"] == [10.0, 10.0, 9.5]
    assert rows["ratio_before"] == [0.05, 0.15, 0.25]
    assert rows["local_steps"] == [10, 20, 30]
    assert rows["lora_importance"] == [3.5, None, None]
    assert rows["reward_loss"] == [0.1, None, None]
    assert rows["reward_progress"] == [0.2, None, None]
    assert rows["reward_importance"] == [0.3, None, None]
    assert rows["reward_time"] == [0.4, None, None]
    assert rows["reward"] == [0.5, None, None]
    assert rows["mode"] == ["m", "m", "n"]


def test_round_row_by_hand():
    row = {name: values[0] for name, values in round_row(*three_clients(), 0.25).to_pydict().items()}
    assert row["idle_fraction"] == pytest.approx(11.0 / 30.5)
    assert {name: row[name] for name in ("round", "start_s", "end_s", "duration_s", "participants", "dropped")} == {
        "round": 4,
        "start_s": 10.0,
        "end_s": 20.0,
        "duration_s": 10.0,
        "participants": 3,
        "dropped": 2,
    }
    assert (row["bytes_down"], row["bytes_up"], row["energy_j"]) == (230.5, 70.0, 24.0)
    assert row["prune_ratio_mean"] == 0.125
    assert row["lora_rank_mean"] == pytest.approx(22 / 3)
    assert (row["accuracy"], row["loss"], row["accuracy_consensus"], row["host_s"]) == (None, None, None, 0.25)


def test_a_failed_training_counts_as_dropped_in_the_round():
    arrivals, learned = three_clients()
    learned = dataclasses.replace(learned, outcome=np.array([Outcome.NON_FINITE, Outcome.LATE, Outcome.DROPPED]))
    assert round_row(arrivals, learned, 0.0)["dropped"].to_pylist() == [3]
    assert client_round_rows(arrivals, learned)["outcome"].to_pylist()[0] == "non_finite"


def test_a_round_without_participants_has_nulls_not_nonsense():
    arrivals, learned = three_clients()

    nothing = np.zeros(len(arrivals), dtype=bool)
    columns = {name: value[nothing] for name, value in vars(arrivals).items() if isinstance(value, np.ndarray)}
    nobody = (
        dataclasses.replace(arrivals, flights=arrivals.flights.take(nothing), **columns),
        dataclasses.replace(
            learned,
            rewards=Rewards.none(0),
            **{name: value[nothing] for name, value in vars(learned).items() if isinstance(value, np.ndarray)},
        ),
    )
    row = round_row(*nobody, 0.0).to_pylist()[0]
    assert (row["participants"], row["idle_fraction"], row["prune_ratio_mean"]) == (0, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_end_s": np.array([15.0, 11.5, 13.0])},
        {"download_start_s": np.array([10.5, 9.0, 10.0])},
        {"end_s": 19.5, "released_s": np.full(3, 19.5)},
        {"upload_end_s": np.array([16.0, np.nan, 13.0])},
    ],
    ids=["backwards", "before the round", "after the round", "missing"],
)
def test_broken_clocks_are_refused_and_the_client_named(changes):
    with pytest.raises(ValueError, match="round 4: timestamps of client 5"):
        client_round_rows(*three_clients(**changes))
    with pytest.raises(ValueError, match="client 5"):
        round_row(*three_clients(**changes), 0.0)


@settings(max_examples=50, deadline=None)
@given(
    start_s=st.floats(0, 1e6),
    steps=st.lists(st.lists(st.floats(0, 1e4), min_size=5, max_size=5), min_size=3, max_size=3),
)
def test_parts_add_up_to_the_round(start_s, steps):
    """Whatever the timestamps, five phases taken from them fill the round for every client (to rounding)."""
    times = start_s + np.cumsum(np.array(steps), axis=1)
    end_s = float(times[:, -1].max())
    flights = dataclasses.replace(three_clients()[0].flights, dispatch_s=np.full(3, start_s))
    rows = client_round_rows(
        *three_clients(
            start_s=start_s,
            end_s=end_s,
            flights=flights,
            released_s=np.full(3, end_s),
            download_start_s=times[:, 0],
            download_end_s=times[:, 1],
            compute_end_s=times[:, 2],
            upload_end_s=times[:, 3],
        )
    ).to_pandas()
    total = rows[["wait_s", "download_s", "compute_s", "upload_s", "idle_s"]].sum(axis=1)
    np.testing.assert_allclose(total, end_s - start_s, rtol=0, atol=1e-9)


def read_bytes(folder, tables=records.TABLES):
    return {table: (folder / f"{table}.parquet").read_bytes() for table in tables}


def append(writer, config, rounds, now_s=0.0):
    for index in rounds:
        arrivals, learned, block = one_round(config, index, now_s, 16)
        now_s = arrivals.end_s
        writer.append_round(arrivals, learned, block, host_s=0.5)
    return now_s


EVERYTHING = RecordSettings()


def write_all(folder, cuts, wanted=EVERYTHING):
    """Twelve rounds in parts that end at `cuts`."""
    folder.mkdir()
    config = config_of("fedspine", 3, 12)
    writer = RecordWriter(folder, wanted)
    now_s = first = 0
    for cut in cuts:
        now_s = append(writer, config, range(first, cut), now_s)
        writer.close_part(cut)
        first = cut
    writer.finish()
    return folder


def test_bytes_do_not_depend_on_where_the_parts_were_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROW_GROUP", 37)  # several row groups, none at a part's end
    whole = write_all(tmp_path / "a", [12])
    single = write_all(tmp_path / "b", range(1, 13))
    assert read_bytes(whole) == read_bytes(single)
    groups = pq.ParquetFile(whole / "client_rounds.parquet").metadata
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [37] * 5 + [192 - 5 * 37]
    assert not (whole / "parts").exists()


def test_many_waiting_rows_close_a_part_and_change_no_byte(tmp_path):
    """Sixteen client rows, two events and one round: a part every third round, besides those of checkpoints."""
    whole = write_all(tmp_path / "a", [12])
    folder = tmp_path / "b"
    folder.mkdir()
    config = config_of("fedspine", 3, 12)
    writer = RecordWriter(folder, EVERYTHING, part_rows=50)
    now_s = append(writer, config, range(7))
    assert [part[2:] for part in list_parts(folder / "parts") if part[1] == "events"] == [(0, 3), (3, 6)]
    writer.close_part(7)
    # Killed two rounds later, of which one part was closed early: the checkpoint of round 7 still holds.
    append(writer, config, range(7, 11), now_s)
    assert list_parts(folder / "parts")[-1][2:] == (7, 10)
    writer = RecordWriter(folder, EVERYTHING, next_round=7, part_rows=50)
    append(writer, config, range(7, 12), now_s)
    writer.close_part(12)
    writer.finish()
    assert read_bytes(whole) == read_bytes(folder)


def test_many_waiting_rounds_close_a_part_too(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PART_ROUNDS", 5)
    append(RecordWriter(tmp_path, EVERYTHING), config_of("fedlora", 0, 12), range(12))
    assert [part[2:] for part in list_parts(tmp_path / "parts") if part[1] == "rounds"] == [(0, 5), (5, 10)]


def test_what_is_read_back_is_what_was_appended(tmp_path):
    folder = write_all(tmp_path / "a", [5, 12])
    config, now_s, expected = config_of("fedspine", 3, 12), 0.0, []
    for index in range(12):
        arrivals, learned, _ = one_round(config, index, now_s, 16)
        now_s = arrivals.end_s
        expected.append(client_round_rows(arrivals, learned))
    assert pq.read_table(folder / "client_rounds.parquet").equals(pa.concat_tables(expected))
    assert pq.read_table(folder / "rounds.parquet")["round"].to_pylist() == list(range(12))
    events = pq.read_table(folder / "events.parquet").to_pandas()
    assert events["event"].tolist() == ["round_open", "round_close"] * 12
    assert events["value"].isna().tolist() == [True, False] * 12


def test_resume_plays_unclosed_and_unchecked_rounds_again(tmp_path):
    """The last part was closed, its checkpoint was not: it goes, and the end is that of an uninterrupted run."""
    whole = write_all(tmp_path / "whole", [4, 8, 12])
    folder = tmp_path / "killed"
    folder.mkdir()
    config = config_of("fedspine", 3, 12)
    writer = RecordWriter(folder, RecordSettings())
    at_four_s = append(writer, config, range(4))
    writer.close_part(4)
    now_s = append(writer, config, range(4, 8), at_four_s)
    writer.close_part(8)
    append(writer, config, range(8, 10), now_s)  # in memory only
    (folder / "parts" / ".rounds-000008-000012.parquet.77.tmp").write_bytes(b"half")
    del writer

    resumed = RecordWriter(folder, RecordSettings(), next_round=4)
    assert {path.name for path, *_ in list_parts(folder / "parts")} == {
        f"{table}-000000-000004.parquet" for table in records.TABLES
    }
    now_s = append(resumed, config, range(4, 8), at_four_s)
    resumed.close_part(8)
    append(resumed, config, range(8, 12), now_s)
    resumed.close_part(12)
    resumed.join()
    # Killed between joining and removing: joining again from the same parts changes nothing.
    RecordWriter(folder, RecordSettings(), next_round=12).finish()
    assert read_bytes(folder) == read_bytes(whole)


def test_a_new_run_starts_without_old_parts(tmp_path):
    writer = RecordWriter(tmp_path, RecordSettings())
    append(writer, config_of("fedlora", 0, 3), range(3))
    writer.close_part(3)
    RecordWriter(tmp_path, RecordSettings())
    assert list_parts(tmp_path / "parts") == []


@pytest.mark.parametrize("lost", ["client_rounds-000000-000002", "client_rounds-000002-000003"])
def test_a_missing_part_is_refused(tmp_path, lost):
    writer = RecordWriter(tmp_path, RecordSettings())
    config = config_of("fedlora", 0, 3)
    now_s = append(writer, config, range(2))
    writer.close_part(2)
    append(writer, config, range(2, 3), now_s)
    writer.close_part(3)
    (tmp_path / "parts" / f"{lost}.parquet").unlink()
    with pytest.raises(RunError, match=r"missing.*--force"):
        RecordWriter(tmp_path, RecordSettings(), next_round=3)
    with pytest.raises(RunError, match=r"missing.*--force"):
        writer.join()


def test_a_damaged_part_is_named(tmp_path):
    writer = RecordWriter(tmp_path, RecordSettings())
    append(writer, config_of("fedlora", 0, 1), range(1))
    writer.close_part(1)
    part = tmp_path / "parts" / "events-000000-000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"events-000000-000001\.parquet' is missing or damaged"):
        writer.finish()
    assert not (tmp_path / "events.parquet").exists()
    assert part.exists()
    with pytest.raises(RunError, match=r"events-000000-000001\.parquet' is damaged \(it has"):
        RecordWriter(tmp_path, RecordSettings(), next_round=1)


@pytest.mark.parametrize("table", ["events", "client_rounds"])
def test_tables_can_be_left_out(tmp_path, table):
    folder = write_all(tmp_path / "run", [12], RecordSettings(**{table: False}))
    left = set(records.TABLES) - {table}
    assert {entry.name for entry in folder.iterdir()} == {f"{name}.parquet" for name in left}
    assert read_bytes(folder, left) == read_bytes(write_all(tmp_path / "all", [12]), left)


def test_rounds_come_in_order(tmp_path):
    writer = RecordWriter(tmp_path, RecordSettings())
    arrivals, learned, block = one_round(config_of("fedlora", 0, 3), 1, 0.0)
    with pytest.raises(ValueError, match="round 1 appended where round 0"):
        writer.append_round(arrivals, learned, block, host_s=0.0)
    append(writer, config_of("fedlora", 0, 3), range(1))
    with pytest.raises(ValueError, match="closed at round 2 where round 1"):
        writer.close_part(2)
    with pytest.raises(ValueError, match="close_part"):
        writer.join()


def test_a_full_disk_while_joining_is_one_sentence_and_keeps_the_parts(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path, RecordSettings())
    append(writer, config_of("fedlora", 0, 2), range(2))
    writer.close_part(2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunError, match=r"rounds\.parquet'.*disk is full"):
        writer.finish()
    assert len(list_parts(tmp_path / "parts")) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["parts"]


def test_the_event_block_of_the_simulator_fits(tmp_path):
    trace = pytest.importorskip("fedsim.sim.trace")
    log = trace.Trace()
    for time_s, client, event, value in (
        (0.5, 3, trace.Event.DOWNLOAD_START, 100.0),
        (0.0, trace.SERVER, trace.Event.ROUND_OPEN, 1.0),
    ):
        log.add_many(np.array([time_s]), 0, np.array([client]), event, np.array([value]))
    arrivals, learned, _ = one_round(config_of("fedlora", 0, 1), 0, 0.0)
    with RunDirectory.create(tmp_path, force=False):
        writer = RecordWriter(tmp_path, RecordSettings())
        writer.append_round(arrivals, learned, log.take_block(), host_s=0.0)
        writer.close_part(1)
        writer.finish()
    events = pd.read_parquet(tmp_path / "events.parquet")
    assert events["client"].tolist() == [-1, 3]
    assert events["event"].tolist() == ["round_open", "download_start"]


def test_made_up_block_has_the_declared_columns():
    assert list(Block(0.0, 1.0, 0).columns()) == CONTRACT["events"].split()
