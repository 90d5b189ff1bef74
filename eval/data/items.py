"""What a model is asked in an evaluation, and what is known of the right answer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
      id: unique in its data.
      messages: the prompt, as chat templates take it; images and videos are paths, or in memory.
      reference: what the task's metric reads ("answer", "answers", "boxes", "options", ...); see `eval.metrics`.
      asked: the prompt as JSON, for the file of answers: a run resumes with an answer only if this is equal.
      group: part of the data that scores are also reported for ("short", "art", ...); None where there are no parts.
      place: file and line of the row.
    """

    id: str
    messages: list[dict[str, Any]]
    reference: Mapping[str, Any]
    asked: Mapping[str, Any]
    group: str | None = None
    place: str | None = None

    @property
    def question(self) -> str:
        """The text of the prompt."""
        return "\n".join(part["text"] for part in self._parts() if part.get("type") == "text")

    @property
    def images(self) -> list[Any]:
        """The images of the prompt, as they were given."""
        parts = (part for part in self._parts() if part.get("type") == "image")
        return [part.get("url", part.get("path", part.get("image"))) for part in parts]

    def _parts(self) -> Iterator[Mapping[str, Any]]:
        for message in self.messages:
            content = message["content"]
            yield from [{"type": "text", "text": content}] if isinstance(content, str) else content
