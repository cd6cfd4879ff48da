"""Damage of any kind is refused in one sentence, and what another version wrote is told apart from damage."""

import json
import random
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import config_of, play, write_run

from fedsim.errors import RunError
from fedsim.records.folder import RunDirectory
from fedsim.records.manifest import SCHEMA_VERSION, Manifest
from fedsim.records.reader import load
from fedsim.records.writer import RecordWriter
from fedsim.settings import RecordSettings


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", rounds=6, clients=8)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", rounds=6, clients=8, stop_before=4)


@pytest.mark.parametrize("table", ["rounds", "client_rounds", "events"])
def test_no_flipped_bit_is_read(finished, tmp_path, table):
    path = shutil.copytree(finished, tmp_path / "run")
    file, draw = path / f"{table}.parquet", random.Random(0)
    whole = file.read_bytes()
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(RunError, match=rf"{table}\.parquet' is damaged \(its SHA-256.*: delete the folder"):
            load(path)._read(table)
    file.write_bytes(whole)
    assert len(load(path)._read(table))


def test_a_missing_row_is_refused(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    pq.write_table(pq.read_table(path / "rounds.parquet").slice(1), path / "rounds.parquet")
    with pytest.raises(RunError, match=r"rounds\.parquet' is damaged"):
        _ = load(path).rounds


@pytest.mark.parametrize("name", ["compute_s", "energy_j"])
def test_page_checksums_find_what_a_run_without_digests_has(finished, tmp_path, name):
    path = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    file = path / "client_rounds.parquet"
    whole = bytearray(file.read_bytes())
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunk = next(
        group.column(place) for place in range(group.num_columns) if group.column(place).path_in_schema == name
    )
    whole[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 4
    file.write_bytes(whole)
    with pytest.raises(RunError, match="are damaged"):
        _ = load(path).client_rounds


@pytest.mark.parametrize("harm", ["bit", "rows", "cut", "gone", "digests"])
def test_a_part_that_is_not_as_it_was_closed_stops_reader_and_resume(begun, tmp_path, harm):
    path = shutil.copytree(begun, tmp_path / "run")
    part = path / "parts" / "rounds-000001-000002.parquet"
    if harm == "bit":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif harm == "rows":
        pq.write_table(pq.read_table(part).slice(0, 0), part)
    elif harm == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif harm == "gone":
        part.unlink()
    else:
        (path / "parts" / "digests-000001-000002.json").write_text("{")
    with pytest.raises(RunError, match="--force"):
        play(path, config_of("fedspine", 0, 6), first=4, now_s=load(begun).rounds["end_s"].iloc[-1], clients=8)
    if harm != "gone":
        with pytest.raises(RunError, match="damaged"):
            _ = load(path).rounds


def test_a_part_without_digests_has_as_many_rounds_as_its_name_says(tmp_path, begun):
    path = shutil.copytree(begun, tmp_path / "run")
    part = path / "parts" / "rounds-000001-000002.parquet"
    (path / "parts" / "digests-000001-000002.json").unlink()
    pq.write_table(pq.read_table(part).slice(0, 0), part)
    with pytest.raises(RunError, match=r"has 0 rows where its name says 1 rounds"):
        RecordWriter(path, RecordSettings(), next_round=4)


def test_parts_that_are_being_closed_are_not_read(begun, tmp_path):
    """Their digests come last."""
    path = shutil.copytree(begun, tmp_path / "run")
    (path / "parts" / "digests-000003-000004.json").unlink()
    assert len(load(path).rounds) == 3


def test_digests_of_rounds_that_are_played_again_go(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "run")
    RecordWriter(path, RecordSettings(), next_round=2)
    assert sorted(file.name for file in (path / "parts").glob("digests*")) == [
        "digests-000000-000001.json",
        "digests-000001-000002.json",
    ]


def other_version(path, table, change, keep_digests=False, **manifest):
    """The run as another version would have written it."""
    tree = json.loads((path / "manifest.json").read_text())
    change(pd.read_parquet(path / f"{table}.parquet")).to_parquet(path / f"{table}.parquet", index=False)
    tree |= {"schema_version": SCHEMA_VERSION + 1, **manifest}
    tree["versions"] = {**tree.get("versions", {}), "fedsim": "9.9"}
    if not keep_digests:
        tree["files"] = {}
    (path / "manifest.json").write_text(json.dumps(tree))


def test_a_column_more_is_passed_over_and_one_fewer_is_null(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    before = load(finished).rounds
    other_version(path, "rounds", lambda rows: rows.drop(columns="accuracy_consensus").assign(news=1.0), more_to_say=7)
    run = load(path)
    assert run.rounds["accuracy_consensus"].isna().all()
    pd.testing.assert_frame_equal(
        run.rounds.drop(columns="accuracy_consensus"), before.drop(columns="accuracy_consensus")
    )
    assert run.manifest["more_to_say"] == 7
    assert run.stated.tree()["more_to_say"] == 7


def test_a_column_of_another_kind_says_who_wrote_it(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    other_version(path, "rounds", lambda rows: rows.assign(participants="many"))
    with pytest.raises(RunError, match=r"written by fedsim 9\.9 .*schema 2\), read by fedsim .*schema 1") as refused:
        _ = load(path).rounds
    assert "delete" not in str(refused.value)
    assert "damaged" not in str(refused.value)


def test_what_is_altered_in_a_run_of_another_version_says_who_wrote_it(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    other_version(path, "rounds", lambda rows: rows.iloc[1:], keep_digests=True)
    with pytest.raises(RunError, match=r"not as it was closed .*written by fedsim 9\.9") as refused:
        _ = load(path).rounds
    assert "delete" not in str(refused.value)


@pytest.mark.parametrize("tree", [[], {}, {"status": "resting"}, {"status": "finished", "rounds": "six"}])
def test_a_manifest_of_wrong_kinds_is_one_sentence(tree):
    with pytest.raises(RunError, match=r"^'m.json' is damaged \(.*\): restore it, or start afresh with --force$"):
        Manifest.of(tree, "m.json")


def test_a_manifest_gives_back_what_it_was_given():
    tree = {"status": "running", "seed": 3, "labels": ["a"], "mine": {"x": [1, None]}, "git": None}
    assert Manifest.of(tree, "m.json").tree() == tree


def test_a_full_table_of_nulls_has_the_type_of_its_column(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    other_version(path, "client_rounds", lambda rows: rows.drop(columns=["device", "lora_rank"]))
    with RunDirectory.open_for_resume(path):
        pass
    rows = load(path).client_rounds
    assert rows[["device", "lora_rank"]].isna().all(axis=None)
    assert pa.Table.from_pandas(rows).num_rows == len(rows)
