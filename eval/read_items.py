"""Read the items of a task from files of data, and check all of them before a model is loaded."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from eval.data.adapters import READERS
from eval.data.digits import BUILT_IN
from eval.data.items import Item
from eval.data.questions import Origin, make_item
from eval.metrics import METRICS
from eval.tasks import Task
from glm4v_jax.data.tables import Parquet, Rows, find_files, open_rows
from glm4v_jax.errors import ConfigError, DataError, Glm4vError, MediaError, raise_listed


def read_items(task: Task, paths: Sequence[str | os.PathLike[str]] = (), *, limit: int | None = None) -> list[Item]:
    """Read the items of a task in the order of its data.

    Images that the files contain are kept in memory until the run ends, encoded as they are, equal ones once. Files are
    read as far as `limit` needs, and Parquet a few rows at a time, whatever the size of its row groups.

    Args:
      task: what is asked.
      paths: files, patterns or directories; none for a task whose data comes with the package.
      limit: read and check the first N items only, as harnesses do.

    Raises:
      OSError: a file cannot be read.
      ConfigError: files are missing or too many.
      DataError, MediaError: a row is invalid; names its place, the field, what was found and expected.
      MessageError: several are invalid; see `raise_listed`.
    """
    if task.is_built_in:
        if paths:
            raise ConfigError(f"--data: found {os.fspath(paths[0])!r}; expected none, as {task.name} has its own data")
        return list(itertools.islice(BUILT_IN[task.reader](), limit))
    if not paths:
        raise ConfigError(f"--data: found no file for {task.name}; expected {task.data}")
    items: dict[str, Item] = {}
    problems: list[Glm4vError] = []
    for found in itertools.islice(_read(task, paths), limit):
        if isinstance(found, Glm4vError):
            problems.append(found)
        elif (first := items.setdefault(found.id, found)) is not found:
            problems.append(
                DataError(f"{found.place}: id: found {found.id!r}, as at {first.place}; expected unique ids")
            )
    raise_listed(problems, "data", "rows")
    return list(items.values())


def _read(task: Task, paths: Sequence[str | os.PathLike[str]]) -> Iterator[Item | Glm4vError]:
    """Iterate over the items, and the errors of invalid rows in their places."""
    reader, metric = READERS[task.reader], METRICS[task.metric]
    total = 0
    known: dict[bytes | str, bytes | str] = {}
    for path in find_files(paths):
        rows = open_rows(path)
        for number, row in enumerate(_in_order(rows)):
            place = rows.place(number)
            try:
                if isinstance(row, DataError):
                    raise row
                for question in reader(row, Origin(path, number, total)):
                    item = make_item(question, task.prompt, task.system, path.parent, place)
                    metric.check(item.reference)
                    _share_images(item, known)
                    yield item
            except (DataError, MediaError) as error:
                problem = type(error)(f"{place}: {error}")
                problem.__cause__ = error
                yield problem
            total += 1


def _in_order(rows: Rows) -> Iterator[dict[str, Any] | DataError]:
    """Iterate over the rows, with errors in place of broken ones; a broken Parquet file ends with its error."""
    if isinstance(rows, Parquet):
        try:
            yield from rows.in_order()
        except DataError as error:
            yield error
        return
    for number in range(len(rows)):
        try:
            yield rows[number]
        except DataError as error:
            yield error


def _share_images(item: Item, known: dict[bytes | str, bytes | str]) -> None:
    """Keep equal images once: tables repeat an image with each question about it."""
    for part in item.messages[-1]["content"]:
        for key in ("image", "url"):
            if isinstance(value := part.get(key), bytes | str):
                part[key] = known.setdefault(value, value)
