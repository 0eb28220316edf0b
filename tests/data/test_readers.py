"""Files are read whole or refused with the file and the line."""

import json
from pathlib import Path

import pytest

from openrl_reason.data.readers import iter_rows, read_rows
from openrl_reason.data.sources import expand
from openrl_reason.errors import DataError

ROWS = [{"question": "1+1?", "answer": "2", "n": 1}, {"question": "caf\u00e9\n?", "answer": "3", "n": 2}]


def write(folder, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path, suffix)
    rows = [row.values for row in read_rows(path, ("question", "answer"))]
    if suffix == ".csv":
        rows = [{**row, "n": int(row["n"])} for row in rows]
    assert rows == ROWS
    assert len(read_rows(path, limit=1)) == 1
    with pytest.raises(DataError, match=r"no column 'anser' \(did you mean 'answer'\?\); there are: question, answer, n"):
        read_rows(path, ("anser",))


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.values for row in read_rows(tmp_path / "x.json")] == ROWS


def test_locations_count_lines_as_an_editor_does(tmp_path):
    path = write(tmp_path, ".jsonl")
    assert [row.where for row in iter_rows(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": 1,}\n', r"a\.jsonl:2: malformed JSON.*column 9"),
        ("a.jsonl", b'{"q": 1}\n{"q": "cut of', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", b'{"q": 1}\n[1, 2]\n', r"a\.jsonl:2: expected a JSON object.*list"),
        ("a.jsonl", b'{"q": "\xff\xfe"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"[{},\n{]", r"a\.json:2: malformed JSON"),
        ("a.json", b"[1]", "row 0: expected a JSON object"),
        ("a.json", b'{"train": [{"q": 1}]}', "with the lists train"),
        ("a.json", b"3", "expected a list of objects, found int"),
        ("a.csv", b"q,a\n1,2\n1,2,3\n", r"a\.csv:3: the number of fields"),
        ("a.csv", b"q,a\n1\n", r"a\.csv:2: the number of fields"),
        ("a.csv", b"q,a\n", "has no rows"),
        ("a.csv", b'q,a\n"1,2\n', "malformed CSV"),
        ("a.parquet", b"PAR1 not really", "malformed Parquet"),
        ("a.md", b"hello", r"files of type \.md are not read"),
        ("a.txt", b"hello", r"a\.txt:1: malformed JSON"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_rows(tmp_path / name)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, ".jsonl")
    with pytest.raises(DataError, match=r"no file .*row\.jsonl \(did you mean 'rows.jsonl'\?\)"):
        read_rows(tmp_path / "row.jsonl")
    with pytest.raises(DataError, match="rows.jsonl: name one of them"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no file data/none.jsonl"):
        read_rows("data/none.jsonl")


def test_a_column_missing_in_one_row_only_is_found_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n{"p": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no column 'q'"):
        read_rows(tmp_path / "a.jsonl", ("q",))


def test_a_folder_saved_by_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert [row.values for row in read_rows(tmp_path / "one")] == ROWS
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "two")
    assert len(read_rows(tmp_path / "two", split="train")) == 2
    with pytest.raises(DataError, match="no split 'test'; there are: train"):
        read_rows(tmp_path / "two", split="test")


def test_a_folder_that_only_looks_like_one_saved_by_datasets_is_no_traceback(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "dataset_info.json").write_text("{}")  # as hub repositories have it beside their files
    (tmp_path / "a.jsonl").write_text('{"q": 1}')
    assert [Path(source.path).name for source in expand([str(tmp_path)])] == ["a.jsonl"]
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="looks like a folder saved by datasets, but cannot be read"):
        read_rows(tmp_path)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_of_one_conversation_is_one_row(tmp_path, indent):
    file, row = tmp_path / "rows.json", {"messages": [{"role": "user", "content": "a"}], "reward": 1}
    file.write_text(json.dumps(row, indent=indent))
    assert [found.values for found in iter_rows(file)] == [row]
    file.write_text(json.dumps({"version": 1, "data": [row]}))
    with pytest.raises(DataError, match="an object with the lists data; save one of them"):
        list(iter_rows(file))


def test_csv_files_of_pandas_with_long_fields_and_wrong_bytes(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",prompt,response\n0,a?,b\n1," + "x" * 200_000 + ",c\n")  # an index without a name
    assert [len(row.values["prompt"]) for row in iter_rows(file)] == [2, 200_000]
    file.write_bytes(b"prompt,response\na,b\nc,\xe9\n")
    with pytest.raises(DataError, match=r"rows.csv: not UTF-8 .*in what follows line"):
        list(iter_rows(file))


def test_a_json_list_that_is_nested_too_deeply_is_malformed(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="rows.json: malformed JSON"):
        list(iter_rows(file))
