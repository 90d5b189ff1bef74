"""How checkpoints write a thought and the answer after it."""

import dataclasses
from collections.abc import Callable, Mapping

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"


@dataclasses.dataclass(frozen=True)
class ThinkingFormat:
    r"""What stands around a thought and an answer.

    >>> THINKING["tagged"].close, THINKING["plain"].close
    ('</think><answer>', '</think>\n')

    Attributes:
      close: what ends a thought and begins an answer.
      has_answer_tags: whether `<answer>` and `</answer>` are tags; else they are text, and so are the tags of thoughts
        once a thought has ended.
      begins_open: whether a text begins within a thought, True, or after one, False, as some prompts end; None for
        neither.
    """

    close: str
    has_answer_tags: bool
    begins_open: bool | None = None

    def written(self, thought: str, answer: str) -> str:
        """Return the text of a turn with a thought.

        >>> THINKING["tagged"].written("1 + 1.", "2")
        '<think>1 + 1.</think><answer>2</answer>'
        """
        begin = THINK + thought.strip()
        if not self.has_answer_tags:
            return begin + self.close + answer
        return begin + (END_THINK + answer if answer.startswith(ANSWER) else self.close + answer + END_ANSWER)


THINKING: Mapping[str, ThinkingFormat] = {
    # <think>...</think><answer>...</answer>: GLM-4.1V
    "tagged": ThinkingFormat(END_THINK + ANSWER, has_answer_tags=True),
    # <think>...</think>, and the answer is text: GLM-4.6V-Flash and those after it
    "plain": ThinkingFormat(END_THINK + "\n", has_answer_tags=False),
}


def thinking_format(template: str | None, has_token: Callable[[str], bool]) -> ThinkingFormat:
    """Return how a checkpoint writes thoughts, by what its files say.

    >>> thinking_format("{{ m.content }}", {"<think>", "<answer>"}.__contains__) is THINKING["tagged"]
    True
    >>> thinking_format("<think></think>{{ m.content }}", {"<think>"}.__contains__) is THINKING["plain"]
    True

    Args:
      template: the chat template. One that writes thoughts itself, as for turns of the history, decides.
      has_token: whether a text is a token of its own. A model that tags its answers has one for the tag.
    """
    template = template or ""
    is_tagged = ANSWER in template if END_THINK in template else has_token(ANSWER)
    return THINKING["tagged" if is_tagged else "plain"]
