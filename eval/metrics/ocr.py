"""OCRBench: whether the right text stands in the answer.

Fields: "answer", or "answers" of which one has to; "type", one of `TYPES`; "dataset" where rows come with one.
"""

import functools

from eval.metrics.metric import UNPARSED, Item, Metric, Score, Scores, answers_of, by_group, mean
from eval.parse_answer import answer_text

FORMULAS = "Handwritten Mathematical Expression Recognition"
_FORMULAS_DATASET = "HME100k"

_RECOGNITION = "Text Recognition"
TYPES = {
    "Regular Text Recognition": _RECOGNITION,
    "Irregular Text Recognition": _RECOGNITION,
    "Artistic Text Recognition": _RECOGNITION,
    "Handwriting Recognition": _RECOGNITION,
    "Digit String Recognition": _RECOGNITION,
    "Non-Semantic Text Recognition": _RECOGNITION,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    FORMULAS: FORMULAS,
}
"""Type of question -> the group it is reported in: 300, 200, 200, 200 and 100 questions."""

# Full-width forms of ASCII and the ideographic space; no more than lmms-eval folds.
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " "}


def ocrbench(text: str, item: Item, is_folded: bool = False) -> Score:
    """1 where an answer of the item is part of the model's, whatever the case, a line break being a space.

    Of formulas the case counts and spaces do not. The whole answer is looked through, not only its box, as VLMEvalKit's
    class for this model does.

    Args:
        text: all that was generated.
        item: a row.
        is_folded: whether full-width letters, digits and marks are those of ASCII, as in lmms-eval.

    Raises:
        DataError: the item has no answer.
    """
    gold = answers_of(item)
    answer = answer_text(text)
    if answer is None:
        return UNPARSED
    is_formula = item.get("type") == FORMULAS or item.get("dataset") == _FORMULAS_DATASET
    read = _read(answer, is_formula, is_folded)
    return Score(float(any(_read(expected, is_formula, is_folded) in read for expected in gold)), answer)


def _read(text: str, is_formula: bool, is_folded: bool) -> str:
    if is_formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    if is_folded:
        text = text.translate(_FULL_WIDTH)
    return text.lower().strip().replace("\n", " ")


def aggregate_ocrbench(scores: Scores) -> dict[str, float]:
    """Share of hits as "score"; their number as "points", of 1000 for the whole set; then by group and by type."""
    return {
        **mean(scores),
        "points": sum(score.value for _, score in scores),
        **by_group(scores, _group, "group"),
        **by_group(scores, "type", "type"),
    }


def _group(item: Item) -> str | None:
    return TYPES.get(str(item.get("type")))


_SOURCE = "OCRBench (arXiv 2305.07895)"

METRICS = (
    Metric("ocrbench", ocrbench, aggregate_ocrbench, f"{_SOURCE}; VLMEvalKit vlmeval/dataset/image_vqa.py"),
    Metric(
        "ocrbench-lmms",
        functools.partial(ocrbench, is_folded=True),
        aggregate_ocrbench,
        f"{_SOURCE}; lmms-eval tasks/ocrbench/utils.py, which folds full-width ASCII",
    ),
)
