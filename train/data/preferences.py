"""Rows of preference data: a preferred answer and a rejected one to the same prompt -> two rows of conversations.

Each of the two is read as any row of its format is. The layouts are those of LLaMA-Factory (`chosen` and `rejected`
beside a prompt in `conversations`, `messages` or `instruction`), ms-swift (`rejected_response` or `rejected_messages`
beside a conversation), and TRL (`chosen` and `rejected` beside a `prompt`, or each a whole conversation).
"""

from collections.abc import Mapping
from typing import Any

from glm4v_jax.data.media import is_empty, kind_of
from glm4v_jax.data.tables import literal_list
from train.data.conversations import Row, Turns, invalid
from train.data.formats import LISTS


def pair_of(row: Row, chosen: str = "chosen", rejected: str = "rejected", messages: str = "") -> tuple[Row, Row]:
    """Divide a row into the one with the preferred answer and the one with the rejected answer.

    `chosen`, `rejected`, `messages`: its fields; a conversation may also be in one of the usual ones. DataError if an
    answer is missing or of another kind.

    >>> pair_of({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"})
    ({'prompt': '1 + 1?', 'completion': '2'}, {'prompt': '1 + 1?', 'completion': '3'})
    """
    if not is_empty(row.get("rejected_images")):
        raise invalid("rejected_images", "some", "none: both answers are about the same images")
    if not is_empty(row.get("rejected_messages")) or not is_empty(row.get("rejected_response")):
        return _of_swift(row)
    for name in (chosen, rejected):
        if is_empty(row.get(name)):
            raise invalid(name, "none", "an answer, of preference data")
    base = {key: value for key, value in row.items() if key not in (chosen, rejected)}
    field = next((name for name in (messages, *LISTS) if name and not is_empty(base.get(name))), None)
    first, second = (_with_answer(base, row[answer], answer, field) for answer in (chosen, rejected))
    return first, second


def _of_swift(row: Row) -> tuple[Row, Row]:
    fields = ("rejected_messages", "rejected_response")
    base = {key: value for key, value in row.items() if key not in fields}
    name = next((name for name in LISTS if not is_empty(base.get(name))), None)
    if not is_empty(row.get("rejected_messages")):
        if name is None:
            raise invalid("rejected_messages", "it without messages", "both")
        return base, base | {name: row["rejected_messages"]}
    answer = row["rejected_response"]
    if not isinstance(answer, str):
        raise invalid("rejected_response", kind_of(answer), "a string")
    if name is None:
        return base, base | {"response": answer}
    *before, last = _messages(base, name)
    if not isinstance(last, Mapping):
        raise invalid(f"{name}[{len(before)}]", kind_of(last), "an object")
    field = "value" if "value" in last else "content"
    return base, base | {name: [*before, {**last, field: answer}]}


def _with_answer(base: Row, answer: Any, field: str, name: str | None) -> Row:
    answer = literal_list(answer)
    is_list = isinstance(answer, list | tuple)
    if not is_list and not isinstance(answer, str | Mapping):
        raise invalid(field, kind_of(answer), "text or messages")
    if name is not None:
        before = _messages(base, name)
        if isinstance(answer, str):
            is_pair = isinstance(before[0], Mapping) and "from" in before[0]
            answer = {"from": "gpt", "value": answer} if is_pair else {"role": "assistant", "content": answer}
        return {**base, name: [*before, *(answer if is_list else [answer])]}
    if not is_empty(base.get("prompt")):
        return {**base, "completion": [answer] if isinstance(answer, Mapping) else answer}
    if is_list:
        return {**base, "messages": answer}
    said = answer if isinstance(answer, str) else answer.get("value", answer.get("content"))
    return {**base, ("response" if "query" in base and "instruction" not in base else "output"): said}


def _messages(row: Row, name: str) -> list[Any]:
    found = literal_list(row[name])
    if not isinstance(found, list | tuple) or not found:
        raise invalid(name, kind_of(found), "a list of messages")
    return list(found)


def compared(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns]:
    """Leave as targets only the messages in which two conversations differ.

    Raises:
      DataError: they do not differ, or not in an answer.
    """
    same = 0
    for one, other in zip(chosen.messages, rejected.messages, strict=False):
        if one != other:
            break
        same += 1
    both = []
    for turns in (chosen, rejected):
        losses = tuple(loss and index >= same for index, loss in enumerate(turns.losses))
        if not any(losses):
            raise invalid("rejected", "the same answer as the chosen one", "another one")
        both.append(turns._replace(losses=losses))
    return both[0], both[1]
