"""OCRBench: whether the right text stands in the answer.

Fields: "answer", or "answers" of which one has to; "type", one of `TYPES`; "dataset" where rows have one.
"""

from eval.metrics.metric import Metric, Reference, Score, Scores, best_match, by_group, mean
from eval.parse_answer import FULL_WIDTH, answer_text

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


def ocrbench(text: str, reference: Reference, is_folded: bool = False) -> Score:
    """Score 1 where a right answer is part of the model's, whatever the case, a line break being a space.

    In formulas case counts and spaces do not. The whole answer is searched, not only its box, as in VLMEvalKit's class
    for this model. `is_folded`: full-width letters, digits and marks equal those of ASCII, as in lmms-eval.
    """
    is_formula = reference.get("type") == FORMULAS or reference.get("dataset") == _FORMULAS_DATASET

    def contains(answer: str, expected: str) -> bool:
        return _plain(expected, is_formula, is_folded) in _plain(answer, is_formula, is_folded)

    return best_match(text, reference, contains, answer_text)


def _plain(text: str, is_formula: bool, is_folded: bool) -> str:
    if is_formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    if is_folded:
        text = text.translate(FULL_WIDTH)
    return text.lower().strip().replace("\n", " ")


def aggregate_ocrbench(scores: Scores) -> dict[str, float]:
    """Return the fraction of hits as "score"; their number as "points", of 1000 in the whole set; by group and type."""
    return {
        **mean(scores),
        "points": sum(score.value for _, score in scores),
        **by_group(scores, _group, "group"),
        **by_group(scores, "type", "type"),
    }


def _group(reference: Reference) -> str | None:
    return TYPES.get(str(reference.get("type")))


_SOURCE = "OCRBench (arXiv 2305.07895)"

_OCRBENCH = Metric("ocrbench", ocrbench, aggregate_ocrbench, f"{_SOURCE}; VLMEvalKit vlmeval/dataset/image_vqa.py")

METRICS = (
    _OCRBENCH,
    _OCRBENCH.variant(
        "ocrbench-lmms", f"{_SOURCE}; lmms-eval tasks/ocrbench/utils.py, which folds full-width ASCII", is_folded=True
    ),
)
