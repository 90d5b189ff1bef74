"""Rows of files: their content and places, and the errors of broken files."""

import base64
import bz2
import codecs
import csv
import gzip
import json
import lzma
import pickle
import subprocess
import sys

import numpy as np
import pytest
from helpers_paths import ROOT

from glm4v_jax.data.tables import JsonLines, Parquet, RowList, find_files, literal_list, open_rows
from glm4v_jax.errors import DataError

ROWS = [{"n": n, "text": "ünïcode 图"} for n in range(5)]


def write(path, rows=ROWS, *, row_group_size=2):
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    elif path.suffix in (".arrow", ".feather"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.ipc

        table = pa.Table.from_pylist(rows)
        # Hugging Face's datasets write streams, Feather is a file.
        new = pyarrow.ipc.new_stream if path.suffix == ".arrow" else pyarrow.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=row_group_size)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def encoded(suffix, rows=ROWS):
    """Rows as the text of a file with a suffix."""
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=False)
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        return "".join(mark.join(map(str, cells)) + "\r\n" for cells in [rows[0], *(row.values() for row in rows)])
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv"])
def test_text_is_read_with_byte_order_marks_and_compressed(tmp_path, suffix, encoding):
    text = encoded(suffix)
    if encoding.startswith("."):
        path = tmp_path / f"data{suffix}{encoding}"
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[encoding]
        path.write_bytes(compress(codecs.BOM_UTF8 + text.encode()))
    else:
        path = tmp_path / f"data{suffix}"
        path.write_bytes(text.encode(encoding))
    rows = pickle.loads(pickle.dumps(open_rows(path)))
    expected = [{"n": str(row["n"]), "text": row["text"]} for row in ROWS] if suffix in (".csv", ".tsv") else ROWS
    assert [rows[index] for index in range(len(rows))] == expected
    assert list(find_files(tmp_path)) == [path]


def test_json_lines_in_json_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "data.json").write_text(encoded(".jsonl"), encoding="utf-8-sig")
    rows = open_rows(tmp_path / "data.json")
    assert isinstance(rows, JsonLines) and [rows[index] for index in range(len(rows))] == ROWS


def test_tables_of_text_spell_lists():
    for text in ('["a.png", null]', "['a.png', None]"):
        assert literal_list(text) == ["a.png", None]
    for text in ("[a].png", "[", '{"a": 1}', "a", "", "[" * 100_000, 7, ["a"]):
        assert literal_list(text) is text


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow", ".feather"])
def test_rows_are_read_in_any_order_and_after_pickling(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}")
    rows = open_rows(path)
    assert len(rows) == 5
    assert [rows[i]["n"] for i in (4, 0, 2, 1, 3)] == [4, 0, 2, 1, 3]
    assert rows[1]["text"] == "ünïcode 图"
    assert rows.place(3) == (f"{path}:4" if suffix == ".jsonl" else f"{path}[3]")
    copied = pickle.loads(pickle.dumps(rows))
    assert [copied[i]["n"] for i in range(len(copied))] == [0, 1, 2, 3, 4]


def test_blank_lines_and_windows_line_ends_are_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\r\n{"n": 0}\r\n\n   \n{"n": 1}')
    rows = JsonLines(path)
    assert [rows[i] for i in range(len(rows))] == [{"n": 0}, {"n": 1}]
    assert [rows.place(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]


def test_a_broken_line_leaves_the_others_readable(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1\n[1]\n\xff\xfe{"n"\n{"n": 2}\n')
    rows = JsonLines(path)
    assert len(rows) == 5
    for index, found in ((1, "invalid JSON"), (2, "found a list; expected an object"), (3, "invalid JSON")):
        with pytest.raises(DataError, match=found):
            rows[index]
    assert rows[4] == {"n": 2}


def test_a_line_is_parsed_without_the_others(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [{"n": i} for i in range(1000)])
    rows = JsonLines(path)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert rows[700] == {"n": 700}
    assert len(parsed) == 1


def test_neighbouring_rows_read_their_row_group_once(tmp_path, monkeypatch):
    rows = Parquet(write(tmp_path / "data.parquet", [{"n": i} for i in range(10)], row_group_size=4))
    import pyarrow.parquet

    read = []
    read_row_group = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group: read.append(group) or read_row_group(self, group),
    )
    assert [rows[i]["n"] for i in range(10)] == list(range(10))
    assert read == [0, 1, 2]


def test_reading_in_order_keeps_a_few_rows_of_a_row_group(tmp_path):
    """One group of 64 rows of 256 KiB: neither the first row nor all in order need more than a few of them."""
    import pyarrow.parquet

    size, count = 256 << 10, 64
    rng = np.random.default_rng(0)
    table = pyarrow.table({"n": range(count), "image": [rng.bytes(size) for _ in range(count)]})
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path, data_page_size=size, write_batch_size=1, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    expected = table.column("image").to_pylist()
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        rows = Parquet(path).in_order()
        assert next(rows) == {"n": 0, "image": expected[0]}
        rows.close()
        assert size < pool.max_memory() < 0.5 * count * size
        assert [row["image"] for row in Parquet(path).in_order()] == expected
        assert pool.max_memory() < 0.5 * count * size
    finally:
        pyarrow.set_memory_pool(before)


def test_reading_a_broken_file_in_order_ends_with_the_error(tmp_path):
    path = write(tmp_path / "data.parquet", [{"n": i} for i in range(100)], row_group_size=20)
    import pyarrow.parquet

    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 16] = b"\xff" * 16
    path.write_bytes(content)
    rows, read = Parquet(path).in_order(), []
    with pytest.raises(DataError, match="cannot be read from here on"):
        while True:
            read.append(next(rows)["n"])
    assert read == list(range(56))  # the last complete batch before the broken group


@pytest.mark.parametrize(
    ("content", "kind", "rows", "place"),
    [
        ('\n{"n": 0}\n{"n": 1}\n', JsonLines, [{"n": 0}, {"n": 1}], ":3"),
        ('{"n": 0, "m": {}}', JsonLines, [{"n": 0, "m": {}}], None),
        ('[{"n": 0}, {"n": 1}]', RowList, [{"n": 0}, {"n": 1}], "[1]"),
        ('{"dataset_name": "x", "data": [{"n": 0}, {"n": 1}]}', RowList, [{"n": 0}, {"n": 1}], ": data[1]"),
        ('{"1": {"n": 0},\n"2": {"n": 1}}', RowList, [{"n": 0}, {"n": 1}], ": '2'"),
        ('{"1": {"n": 0}, "2": {"n": 1}}', RowList, [{"n": 0}, {"n": 1}], ": '2'"),
    ],
)
def test_json_files_are_lines_a_list_or_an_object_of_rows(tmp_path, content, kind, rows, place):
    path = tmp_path / "data.json"
    path.write_text(content)
    found = open_rows(path)
    assert isinstance(found, kind) and [found[i] for i in range(len(found))] == rows
    assert place is None or found.place(1) == f"{path}{place}"


@pytest.mark.parametrize("content", ['[{"n": 1}, [2]]', '{"data": [{"n": 1}, [2]]}'])
def test_a_json_file_is_parsed_once_and_rows_are_objects(tmp_path, monkeypatch, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    rows = open_rows(path)
    assert len(rows) == 2 and rows[0] == {"n": 1}
    assert len(parsed) == (1 if content.startswith("[") else 2)
    with pytest.raises(DataError, match="found a list; expected an object"):
        rows[1]


def test_tsv_rows_share_images_by_index(tmp_path):
    image = base64.b64encode(bytes(range(100))).decode()
    path = tmp_path / "data.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [["index", "image", "question", "hint"], [7, image, 'two\nlines, "quoted"', ""], [8, "7", "What?", "h"]]
        )
    limit = csv.field_size_limit()
    rows = open_rows(path)
    assert csv.field_size_limit() == limit
    assert rows[0] == {"index": "7", "image": image, "question": 'two\nlines, "quoted"'}
    assert rows[1] == {"index": "8", "image": image, "question": "What?", "hint": "h"}
    assert [rows.place(index) for index in range(2)] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.json", b'[{"n": 0},\n {"n": ]', r"data\.json:2: found invalid JSON"),
        ("data.json", b'{\n"n": 0}', r"data\.json: found an object; expected a list"),
        ("data.json", b"[]", "found no row"),
        ("data.json", b"", r"data\.json:1: found invalid JSON"),
        ("data.jsonl", b"\n\n", "found no row"),
        ("data.json", b"{", r"found invalid JSON"),
        ("data.tsv", b"a\tb\n1\t2\t3\n", r"data\.tsv:2: found 3 cells; expected 2 as in the first line"),
        ("data.tsv", b"a\tb\n", "found no row"),
        ("data.tsv", b"a\tb\n\xff\t1\n", "found invalid TSV"),
        ("data.parquet", b"PAR1 and nothing more", r"data\.parquet: found invalid Parquet"),
        ("data.csv", b"a,b", "found no row"),
        ("data.csv", b"a,b\n1,2,3\n", r"data\.csv:2: found 3 cells; expected 2 as in the first line"),
        ("data.csv", b"a,b\n\xff,1\n", "found invalid CSV .* expected a CSV file in UTF-8"),
        ("data.jsonl.gz", b"{}", r"data\.jsonl\.gz: cannot be read .*; expected a complete file"),
        (
            "data.jsonl.gz",
            gzip.compress(b"{}" * 1000, mtime=0)[:-9],
            r"data\.jsonl\.gz: cannot be read .*; expected a complete file",
        ),
        ("data.json.bz2", b"{}", "cannot be read"),
        ("data.csv.xz", b"{}", "cannot be read"),
        ("data.arrow", b"ARROW1 and nothing more", r"data\.arrow: found invalid Arrow"),
        ("data.txt", b"a,b", r"found the suffix '\.txt'; expected \.json, \.jsonl, .*\.parquet, \.arrow, .* \.gz"),
        ("data.parquet.gz", b"", r"found the suffix '\.parquet\.gz'; expected"),
        ("data", b"", "found the suffix ''"),
    ],
)
def test_invalid_files_are_errors_that_name_them(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        open_rows(tmp_path / name)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".csv", ".tsv"])
def test_a_missing_file_is_an_error(tmp_path, suffix):
    with pytest.raises(OSError):
        open_rows(tmp_path / f"none{suffix}")


def test_a_truncated_row_group_is_an_error_when_it_is_read(tmp_path):
    path = write(tmp_path / "data.parquet", [{"n": i, "text": str(i) * 100} for i in range(100)], row_group_size=50)
    rows = open_rows(path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match="row group 0 cannot be read"):
        rows[0]


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = write(tmp_path / "data.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow, which is not installed; pip install pyarrow"):
        open_rows(path)


def test_training_data_is_read_without_jax_and_pyarrow(tmp_path):
    path = write(tmp_path / "data.jsonl")
    program = (
        "import sys; import train.data.check, train.data.lengths; from train.data.records import read_records\n"
        f"read_records({str(path)!r})\n"
        "loaded = {'jax', 'flax', 'pyarrow', 'grain', 'optax'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_directories_and_lists_are_searched_for_data_files(tmp_path):
    for name in ("b.jsonl", "a.json", "dataset_info.json", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.jsonl").write_text("")
    assert [path.name for path in find_files(tmp_path)] == ["a.json", "b.jsonl"]
    named = [tmp_path / "b.jsonl", tmp_path / "deeper"]
    assert [path.name for path in find_files(named)] == ["b.jsonl", "c.jsonl"]
    assert [path.name for path in find_files(tmp_path / "*.jsonl")] == ["b.jsonl"]
    assert [path.name for path in find_files([f"{tmp_path}/**/*.jsonl"])] == ["b.jsonl", "c.jsonl"]
    with pytest.raises(DataError, match=r"\*\.csv: found no file that matches"):
        list(find_files(tmp_path / "*.csv"))
    # Tables of text beside other data tell about it.
    (tmp_path / "metadata.csv").write_text("")
    (tmp_path / "c[1].jsonl").write_text("")
    assert [path.name for path in find_files(tmp_path)] == ["a.json", "b.jsonl", "c[1].jsonl"]
    assert [path.name for path in find_files(tmp_path / "c[1].jsonl")] == ["c[1].jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no data file"):
        list(find_files(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError):
        list(find_files(tmp_path / "none"))
