"""The tasks whose data comes with the package: held-out handwritten digits, for the packaged tiny model."""

import itertools
from collections.abc import Callable, Iterator, Mapping

from eval.data.items import Item
from eval.data.questions import digest
from glm4v_jax.generate.text.boxes import SCALE
from glm4v_jax.tiny.digits import Example, held_out


def _reading() -> Iterator[Item]:
    for example in held_out("reading"):
        yield _item(example, None)


def _grounding() -> Iterator[Item]:
    # Alternating, so that the first few items have both kinds.
    pairs = zip(held_out("grounding1"), held_out("grounding2"), strict=True)
    for example in itertools.chain.from_iterable(pairs):
        yield _item(example, "one digit" if len(example.boxes) == 1 else "two digits")


def _motion() -> Iterator[Item]:
    for example in held_out("motion"):
        yield _item(example, example.answer)


BUILT_IN: Mapping[str, Callable[[], Iterator[Item]]] = {
    "digits-vqa": _reading,
    "digits-grounding": _grounding,
    "digits-motion": _motion,
}
"""Name of a reader -> its items, always the same ones with the same ids; see `glm4v_jax.tiny.digits`.

They raise `DataError` where scikit-learn is not installed.
"""


def _item(example: Example, group: str | None) -> Item:
    """Make an item; "boxes" are of the digit that is asked for, "other_boxes" of the others, both from 0 to 1000."""
    reference: dict[str, object] = {"answer": example.answer}
    if example.boxes:
        asked, *others = (list(box) for box in example.boxes)
        # In the units in which the model writes boxes.
        reference |= {"boxes": [asked], "other_boxes": others, "width": SCALE, "height": SCALE}
    (message,) = example.prompt
    asked_for = {
        "content": [
            part if part["type"] == "text" else {"type": part["type"], part["type"]: digest(part[part["type"]])}
            for part in message["content"]
        ]
    }
    return Item(example.source, [message], reference, asked_for, group, example.source)
