"""What an agent on a phone does next: `do(action="Tap", element=[500, 120])` or `finish(message="Done.")`.

AutoGLM-Phone writes one action after its thought, as a call in Python's notation. What its own agent accepts is read
(zai-org/Open-AutoGLM, `phone_agent/actions/handler.py` and `phone_agent/model/client.py`):

- The action begins at `finish(message=`, else at `do(action=`, with or without tags of thought and answer around it.
- The text of `Type` and the message of `finish` are what stands between the outer quotes, as it is: quotes in it need
  no backslash, and a backslash is one.
- `Type_Name` is `Type`.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.generate.text.boxes import to_pixels
from glm4v_jax.generate.text.thinking import END_ANSWER, parse

FINISH = "finish"
"""The name of the last action."""

_BEGINNINGS = ("finish(message=", "do(action=")
_POINTS = ("element", "start", "end")
_RAW = {"Type": "text", FINISH: "message"}
"""Arguments that are read as they are written."""
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
_MAX_ENDS = 64  # parentheses in one action


@dataclasses.dataclass(frozen=True)
class Action:
    """An action of an agent.

    >>> action = find_action('<think>The button.</think><answer>do(action="Tap", element=[500, 120])</answer>')
    >>> action.name, action.arguments, action.pixels(1080, 2400)
    ('Tap', {'element': [500, 120]}, {'element': (540, 288)})

    Attributes:
      name: "Tap", "Type", "Swipe", "Launch", ...; "finish" ends the task.
      arguments: by name, without `action`; of "finish" the message.
    """

    name: str
    arguments: Mapping[str, Any]

    @property
    def is_last(self) -> bool:
        """Whether the task ends with it."""
        return self.name == FINISH

    def pixels(self, width: int, height: int) -> dict[str, tuple[int, ...]]:
        """The points in the arguments (`element`, `start`, `end`) as pixels of a screen of this size.

        Raises:
          GenerationError: the screen is empty, or one of them is not a point or box of finite numbers.
        """
        found = {name: self.arguments[name] for name in _POINTS if name in self.arguments}
        return {name: to_pixels([_numbers(value)], width, height)[0] for name, value in found.items()}


def find_action(text: str, *, thinking: ThinkingFormat = THINKING["tagged"]) -> Action | None:
    """Return the action in what the model wrote, None where there is none, or only a part of one. Never raises.

    >>> find_action('I am done. finish(message="The alarm is "on".")').arguments
    {'message': 'The alarm is "on".'}

    Args:
      text: all that was generated.
      thinking: how the model writes thoughts; those of a text that has nothing else are searched too.
    """
    for place in (parse(text, thinking).answer, text):
        for beginning in _BEGINNINGS:
            begin = place.find(beginning)
            if begin >= 0:
                return _read(place[begin:].split(END_ANSWER)[0].rstrip())
    return None


def _read(text: str) -> Action | None:
    """The action at the beginning of a text."""
    end, arguments = _parsed(text)
    name = FINISH if text.startswith(FINISH) else arguments.pop("action", None)
    if name is None and (found := re.match(r"""do\(action=["'](Type(?:_Name)?)["']""", text)):
        name = found[1]  # of a text with quotes in it
    name = "Type" if name == "Type_Name" else name
    if not isinstance(name, str):
        return None
    if name in _RAW:
        value = _raw(text[:end], _RAW[name])
        return None if value is None else Action(name, {_RAW[name]: value})
    return Action(name, arguments) if end is not None else None


def _parsed(text: str) -> tuple[int | None, dict[str, Any]]:
    """Where the first whole call ends, and its arguments; None and none where Python cannot read it."""
    for found in list(re.finditer(r"\)", text))[:_MAX_ENDS]:
        try:
            call = ast.parse(text[: found.end()].translate(_ESCAPES), mode="eval").body
            if isinstance(call, ast.Call):
                return found.end(), {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
    return None, {}


def _raw(text: str, name: str) -> str | None:
    """What stands between the quotes of the last argument, which has this name; None where they are not whole."""
    found = re.search(rf"""{name}=(["'])(.*)\1\s*\)$""", text, re.DOTALL)
    return None if found is None else found[2]


def _numbers(value: Any) -> list[float]:
    """Numbers of a list, NaN for what is not a number."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one if isinstance(one, int | float) else float("nan") for one in values]
