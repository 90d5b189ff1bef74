"""From files to items: limits, unique ids, all invalid rows at once, and memory."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from eval.read_items import read_items
from eval.tasks import TASKS, Task
from glm4v_jax.errors import ConfigError, DataError, MessageError

TASK = Task("test", "exact_match")
ROW = {"question": "What?", "answer": "a"}


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_is_required_or_refused():
    with pytest.raises(ConfigError, match=r"--data: found no file for chartqa; expected test_human\.json"):
        read_items(TASKS["chartqa"])
    with pytest.raises(ConfigError, match=r"--data: found 'a\.json'; expected none, as digits-vqa has its own data"):
        read_items(TASKS["digits-vqa"], ["a.json"])
    with pytest.raises(FileNotFoundError):
        read_items(TASKS["chartqa"], ["nowhere.parquet"])


def test_all_invalid_rows_are_listed(tmp_path):
    path = write(tmp_path, [ROW, {"question": "Who?"}, ROW, {"answer": "a"}, *[{}] * 30])
    with pytest.raises(MessageError) as error:
        read_items(TASK, [path])
    lines = str(error.value).splitlines()
    assert len(error.value.faults) == 32
    assert "found 32 invalid rows; expected none" in lines[0]
    assert lines[1].startswith(f"{path}:2: ") and lines[2].startswith(f"{path}:4: ")
    assert lines[-1] == "and 12 more"


def test_the_metric_checks_the_rows(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:1: options: found nothing"):
        read_items(Task("test", "mcq"), [write(tmp_path, [ROW])])


def test_ids_are_unique(tmp_path):
    path = write(tmp_path, [{**ROW, "id": name} for name in (1, "2", "1")])
    with pytest.raises(DataError, match=rf"{path}:3: id: found '1', as at {path}:1; expected unique ids"):
        read_items(TASK, [path])


def test_the_limit_counts_items_of_all_files_and_ends_checking(tmp_path):
    rows = [{"question": str(number), "answer": "a"} for number in range(9)]
    paths = [write(tmp_path, rows, "1.jsonl"), write(tmp_path, [*rows, {}], "2.jsonl")]
    items = read_items(TASK, paths, limit=12)
    assert [item.question for item in items] == [*"012345678", *"012"]
    assert [item.id for item in items] == [str(number) for number in range(12)]


@pytest.mark.parametrize("broken", [None, 15])
def test_a_table_is_read_as_far_as_the_limit(tmp_path, broken):
    """40 images of 192 KiB in one row group; or a second group that cannot be read."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    file = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(file, "PNG", compress_level=0)
    rows = [{"question": str(n), "answer": "7", "image": file.getvalue() + rng.bytes(9)} for n in range(40)]
    path = tmp_path / "data.parquet"
    options = {"use_dictionary": False, "data_page_size": 1 << 16, "write_batch_size": 1, "compression": "none"}
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=broken or 40, **options)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        (item,) = read_items(TASK, [path], limit=1)
        assert item.images == [rows[0]["image"]]
        assert pool.max_memory() < 0.5 * path.stat().st_size
    finally:
        pa.set_memory_pool(before)
    if broken:
        column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
        content = bytearray(path.read_bytes())
        content[column.data_page_offset : column.data_page_offset + 16] = b"\xff" * 16
        path.write_bytes(content)
        assert len(read_items(TASK, [path], limit=8)) == 8
        with pytest.raises(DataError, match=r"data\.parquet\[8\]: cannot be read from here on"):
            read_items(TASK, [path])
