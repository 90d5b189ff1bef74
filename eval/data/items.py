"""What a model is asked in an evaluation, and what is known of the right answer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
      id: what tells it from the others of its data.
      messages: the prompt, as chat templates take it; pictures and videos are paths, or in memory.
      reference: what the task's metric looks at ("answer", "answers", "boxes", "options", ...); see `eval.metrics`.
      asked: the prompt as JSON has it, for the file of answers: with another one, an answer is not gone on with.
      group: what scores are also told by ("short", "art", ...); None where a task has no such parts.
      place: file and line where it stands.
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
    def pictures(self) -> list[Any]:
        """The pictures of the prompt, as they were given."""
        parts = (part for part in self._parts() if part.get("type") == "image")
        return [part.get("url", part.get("path", part.get("image"))) for part in parts]

    def _parts(self) -> Iterator[Mapping[str, Any]]:
        for message in self.messages:
            content = message["content"]
            yield from [{"type": "text", "text": content}] if isinstance(content, str) else content
