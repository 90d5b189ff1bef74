"""Problems to learn from by reward: rows of data files as prompts, each with what answers are compared to.

Rows are those that `train.data.formats` reads. The reference is in fields of its own:

- "answer", or "solution"; "answers", of which any is right; "options" of a choice;
- "boxes" [[x1, y1, x2, y2], ...] in pixels of the first image; "width", "height" of it, by default read from its file.

The conversation then ends with the question. Without such a field its last message is the reference: what stands in its
box, and the boxes that it names, in thousandths. Further fields: "domain", whose verifier scores the answers; "level",
a label of how hard the problem is; and "key", its name, by default a digest of all this.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, overload

from eval.metrics import Reference
from eval.parse_answer import final_answer
from glm4v_jax.config.checks import one_of, raise_faults
from glm4v_jax.data.media import file_name, image_size, is_remote, source_of
from glm4v_jax.data.tables import literal_list
from glm4v_jax.errors import DataError, Glm4vError, MediaError, counted, naming, one_line
from glm4v_jax.generate.text.boxes import SCALE, find_boxes
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import TrainConfig
from train.data import FormatName
from train.data.formats import LISTS, QUERIES, RESPONSES, Columns, only_field
from train.data.lengths import TokenCounter
from train.data.records import Record, Records, question_of, read_records
from train.job import check_media_dir
from train.rl.self_test import Example

_REFERENCE = ("answer", "answers", "solution", "boxes")
_BESIDE = ("answers", "options", "boxes", "width", "height")
_PROMPT = "prompt"
_ASSISTANTS = ("assistant", "gpt", "bot")
_SHOWN = 3
"""Bad rows that an error names."""
_FPS = 2.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, and what answers to it are compared to.

    Attributes:
      messages: the conversation up to the question, as chat templates take it.
      item: the reference; see `eval.metrics` for its fields.
      domain: whose verifier scores the answers.
      level: a label of how hard it is; None where the row has none.
      key: its name, which no other problem has.
      source: its place in the data, "data.jsonl:12".
    """

    messages: tuple[Mapping[str, Any], ...]
    item: Reference
    domain: str
    level: str | None
    key: str
    source: str


class Problems(Sequence[Problem]):
    """All problems of a job by their number; messages are read on demand, references once, at the start.

    Attributes:
      keys, domains, levels: of each problem.
      items, sources: of each problem, see `Problem`.
    """

    def __init__(self, records: Records, domains: Collection[str], fps: float = _FPS):
        """Read all references; videos that are given as frames without a rate get `fps`.

        DataError, by file and row, if rows cannot be read, have no reference, or are of another domain than those that
        have a verifier; a row without a domain is of the only one.
        """
        self._records, self._fps = records, fps
        self.keys: list[str] = []
        self.domains: list[str] = []
        self.levels: list[str | None] = []
        self.items: list[Reference] = []
        self.sources: list[str] = []
        faults = []
        places: dict[str, str] = {}
        for number in range(len(records)):
            try:
                self._add(number, domains, places)
            except Glm4vError as error:
                faults.append(str(error))
            except OSError as error:
                faults.append(f"{records.place(number)}: {one_line(error)}")
        raise_faults(faults, DataError, shown=_SHOWN)

    def _add(self, number: int, domains: Collection[str], places: dict[str, str]) -> None:
        row, record = self._records.row(number), self._records[number]
        try:
            if record.tools:
                raise DataError("tools: found some; expected none: answers that call tools are not judged")
            messages, said = question_of(record, self._fps)
            item = reference_of(row, said, record)
            domain = _domain_of(row, domains)
        except (DataError, MediaError) as error:
            already = str(error).startswith(record.source)
            raise DataError(str(error) if already else f"{record.source}: {error}") from error
        key = row.get("key")
        if key is None:
            key = digest = _digest(messages, item)
            count = 1
            while key in places:  # the same problem again
                count += 1
                key = f"{digest}#{count}"
        elif str(key) in places:
            raise DataError(f"{record.source}: key: found {key!r} as in {places[str(key)]}; expected one of its own")
        places[str(key)] = record.source
        level = row.get("level")
        self.keys.append(str(key))
        self.domains.append(domain)
        self.levels.append(None if level is None else str(level))
        self.items.append(item)
        self.sources.append(record.source)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        """Return a problem; raise `DataError` if its row can no longer be read."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        messages, _ = question_of(self._records[index], self._fps)
        return Problem(
            tuple(messages), self.items[index], self.domains[index], self.levels[index], self.keys[index],
            self.sources[index],
        )  # fmt: skip

    def examples(self) -> list[Example]:
        """Return the references, for `self_test`."""
        return [Example(*one) for one in zip(self.domains, self.items, self.sources, strict=True)]

    def fingerprint(self) -> str:
        """Return a digest of the files' content."""
        return self._records.fingerprint()


def read_problems(
    files: Sequence[str],
    domains: Collection[str],
    *,
    format: FormatName | None = None,
    media_dir: str | None = None,
    fps: float = _FPS,
) -> Problems:
    """Read the problems of data files.

    >>> import json, pathlib, tempfile
    >>> row = {"messages": [{"role": "user", "content": "How much is 2 + 3?"}], "answer": 5}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "sums.jsonl")
    ...     _ = path.write_text(json.dumps(row))
    ...     problem = read_problems([str(path)], ["math"])[0]
    >>> problem.item, problem.domain, problem.messages[0]["content"]
    ({'answer': 5}, 'math', [{'type': 'text', 'text': 'How much is 2 + 3?'}])

    Args:
      files, format, media_dir: see `train.data.records.read_records`.
      domains, fps: see `Problems`.

    Raises:
      OSError: a file cannot be read.
      DataError: rows are not problems; by file and row.
    """
    records = read_records(files, format=format, media_dir=media_dir, change=answered)
    return Problems(records, domains, fps)


def problems_of(config: TrainConfig, processor: Glm4vProcessor) -> Problems:
    """Read the problems of a job that learns by reward, within the limits of its processor; errors name the field."""
    assert config.rl is not None
    data = config.data
    check_media_dir(data)
    with naming("data.files"):
        return read_problems(
            data.files, config.rl.verifiers, format=data.format, media_dir=data.media_dir,
            fps=processor.video_processor.fps,
        )  # fmt: skip


def check_lengths(
    problems: Problems,
    processor: Glm4vProcessor,
    longest: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Check that prompts fit a row beside their answers, before a step draws one that does not, and the job ends.

    Images are not decoded. Problems with a video, or files of other machines, are passed over: those take long.

    `progress` is called with the number of problems checked, and of all. DataError if prompts are longer than `longest`
    tokens, or an image of one cannot be read; by file and row.
    """
    count, faults = TokenCounter(processor), []
    for number, problem in enumerate(problems):
        if progress is not None:
            progress(number, len(problems))
        contents = [one["content"] for one in problem.messages if not isinstance(one["content"], str)]
        media = [item for content in contents for item in content if item["type"] != "text"]
        if any(item["type"] != "image" or is_remote(item) for item in media):
            continue
        try:
            if (length := count.of(problem.messages, media)) > longest:
                expected = f"at most {longest:,}: a row, batch.length, also has the answer"
                raise DataError(f"found a prompt of at least {counted(length, 'token')}; expected {expected}")
        except Glm4vError as error:
            faults.append(f"{problem.source}: {error}")
    if progress is not None:
        progress(len(problems), len(problems))
    raise_faults(faults, DataError, shown=_SHOWN)


def answered(row: Mapping[str, Any], columns: Columns | None = None) -> Mapping[str, Any]:
    """Return a row with its reference as the answer of its conversation, where that ends with the question.

    `columns` are the names of its fields, of a dataset_info.json. DataError if it has no reference.
    """
    text = next((str(row[name]) for name in _REFERENCE if row.get(name) is not None), None)
    names = LISTS if columns is None else (columns.messages,)
    if not any(row.get(name) for name in names) and isinstance(literal_list(row.get(_PROMPT)), list | tuple):
        row = {**{name: value for name, value in row.items() if name != _PROMPT}, "messages": row[_PROMPT]}
    name = next((name for name in names if row.get(name)), None)
    if name is not None:
        messages = literal_list(row[name])
        last = messages[-1] if isinstance(messages, list | tuple) and messages else None
        if not isinstance(last, Mapping):
            return row  # an error that the format's reader words
        role = "from" if "from" in last else "role" if "role" in last else columns.role_tag if columns else ""
        content = "value" if "value" in last else "content" if "content" in last else columns and columns.content_tag
        roles = {} if columns is None else columns.roles
        assistants = [*_ASSISTANTS, *(key for key, means in roles.items() if means == "assistant")]
        if last.get(role) in assistants or role not in last or not content:
            return row
        if text is None:
            expected = f"one of {', '.join(_REFERENCE)}, or an answer as the last message"
            raise DataError(f"answer: found none; expected {expected}")
        return {**row, name: [*messages, {role: assistants[-1] if roles else "assistant", content: text or "-"}]}
    if columns is not None:
        return row if text is None or row.get(columns.response) else {**row, columns.response: text}
    query = only_field(row, QUERIES)
    if text is None or query is None:
        return row
    return {**{name: value for name, value in row.items() if name not in RESPONSES}, "response": text or "-"}


def reference_of(row: Mapping[str, Any], said: str, record: Record) -> Reference:
    """Return the reference of a row, whose conversation ends with `said`; the record has the size of its first image.

    DataError if there is none; MediaError if the size of the image is needed, and cannot be read.
    """
    item = {name: row[name] for name in _BESIDE if row.get(name) is not None}
    given = next((row[name] for name in ("answer", "solution") if row.get(name) is not None), None)
    if given is None and not {"answers", "boxes"} & item.keys():
        given = said
        if named := find_boxes(said):
            item |= {"boxes": [list(box) for box in named], "width": SCALE, "height": SCALE}
    if isinstance(given, str):
        given = final_answer(given)
        if given is None:
            raise DataError("answer: found an empty one; expected the right answer")
    if given is not None:
        item["answer"] = given
    if "boxes" in item and not {"width", "height"} <= item.keys():
        image = next(iter(record.media("image")), None)
        if image is None:
            raise DataError("width, height: found none, and no image; expected the size of what the boxes are on")
        item["width"], item["height"] = image_size(image)
    return item


def _domain_of(row: Mapping[str, Any], domains: Collection[str]) -> str:
    domain = row.get("domain")
    if domain is None and len(domains) == 1:
        return next(iter(domains))
    if not isinstance(domain, str) or domain not in domains:
        found = "none" if domain is None else repr(domain)
        raise DataError(f"domain: found {found}; expected {one_of(domains, domain)}, which have verifiers")
    return domain


def _digest(messages: Sequence[Mapping[str, Any]], item: Reference) -> str:
    """Digest what a problem is: texts, names or contents of its media, and the reference; not where its files are."""
    hashed = hashlib.blake2b(repr(sorted(item.items())).encode(errors="surrogatepass"), digest_size=12)
    for message in messages:
        more = {name: message[name] for name in ("tool_calls", "reasoning_content") if name in message}
        hashed.update(repr(more).encode(errors="surrogatepass") if more else b"")
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            essence = part["text"] if part["type"] == "text" else _essence(source_of(part))
            text = essence if isinstance(essence, bytes) else str(essence).encode(errors="surrogatepass")
            hashed.update(f"\0{message['role']}\0{part['type']}\0".encode() + text)
    return hashed.hexdigest()


def _essence(source: Any) -> Any:
    if isinstance(source, list | tuple):
        return [_essence(frame) for frame in source]
    if (name := file_name(source)) is not None:
        return name
    return bytes(source) if isinstance(source, bytes | bytearray | memoryview) else source.tobytes()
