"""From files of data to the items of a task, all of them checked before a model is loaded."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.data.adapters import READERS
from eval.data.digits import BUILT_IN
from eval.data.items import Item
from eval.data.questions import Origin, make_item
from eval.metrics import METRICS
from eval.tables import SUFFIXES, open_table
from glm4v_jax.data.tables import Parquet, Rows, find_files
from glm4v_jax.errors import ConfigError, DataError, Glm4vError, ListedError, MediaError

if TYPE_CHECKING:
    from eval.tasks import Task

_LISTED = 20
"""So many wrong rows are told at once."""


def read_items(task: "Task", paths: Sequence[str | os.PathLike[str]] = (), *, limit: int | None = None) -> list[Item]:
    """The items of a task in the order of its data.

    Pictures that are in the files themselves are kept in memory, encoded as they are, equal ones once, until the run
    ends: so much memory as the files with the pictures of the items asked have bytes. Files are read as far as `limit`
    needs, and Parquet a few rows at a time, whatever the size of its row groups.

    Args:
      task: what is asked.
      paths: files or directories; none for a task whose data comes with the package.
      limit: read the first so many items only, as harnesses do; what is behind them is not checked.

    Raises:
      OSError: a file cannot be read.
      ConfigError: files are missing or too many, or the task itself is wrong.
      DataError, MediaError: what is wrong with a row; names its place, the field, what was found and expected. A
        `ListedError` where several are wrong.
    """
    if task.is_built_in:
        if paths:
            raise ConfigError(f"--data: found {os.fspath(paths[0])!r}, but {task.name} has its own data; expected none")
        return list(itertools.islice(BUILT_IN[task.reader](), limit))
    if not paths:
        raise ConfigError(f"--data: found no file for {task.name}, expected {task.data}")
    items: list[Item] = []
    problems: list[Glm4vError] = []
    places: dict[str, str | None] = {}
    for found in itertools.islice(_read(task, paths), limit):
        if isinstance(found, Item):
            if found.id in places:
                found = DataError(
                    f"{found.place}: field 'id': found {found.id!r}, which is also at {places[found.id]}; expected "
                    "different ones"
                )
            else:
                places[found.id] = found.place
                items.append(found)
        if isinstance(found, Glm4vError):
            problems.append(found)
    _raise(problems)
    return items


def _read(task: "Task", paths: Sequence[str | os.PathLike[str]]) -> Iterator[Item | Glm4vError]:
    """Items, and in the places of wrong rows what is wrong with them."""
    reader, metric = READERS[task.reader], METRICS[task.metric]
    total = 0
    known: dict[bytes | str, bytes | str] = {}
    for path in find_files(list(paths), SUFFIXES):
        rows = open_table(path)
        for number, row in enumerate(_in_order(rows)):
            place = rows.place(number)
            try:
                if isinstance(row, DataError):
                    raise row
                origin = Origin(Path(path), number, total)
                for question in reader(row, origin):
                    item = make_item(question, task.prompt, task.system, path.parent, place)
                    metric.check(item.reference)
                    _share(item, known)
                    yield item
            except (DataError, MediaError) as error:
                problem = type(error)(f"{place}: {error}")
                problem.__cause__ = error
                yield problem
            total += 1


def _in_order(rows: Rows) -> Iterator[dict[str, Any] | DataError]:
    """The rows, and in the places of broken ones what is wrong with them; behind what ends a table there is nothing."""
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


def _share(item: Item, known: dict[bytes | str, bytes | str]) -> None:
    """Puts one object in the place of equal pictures: tables repeat a picture with each question about it."""
    for part in item.messages[-1]["content"]:
        for key in ("image", "url"):
            if isinstance(value := part.get(key), bytes | str):
                part[key] = known.setdefault(value, value)


def _raise(problems: Sequence[Glm4vError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        found = f"data: found {len(problems)} wrong rows, expected none:"
        raise ListedError([found, *map(str, problems[:_LISTED]), *more])
