r"""Reading documents, as GLM-OCR is measured: edit distance of text and formulas, TEDS of tables.

Fields: "answer", or "answers", of which the best counts: text, LaTeX, or HTML with a table.

The figures of OmniDocBench (arXiv 2412.07626) for whole pages also need their layout, and its score of formulas (CDM)
renders them with TeX; these are not here. "-omnidocbench" is its normalisation of version 1.5, without the conversion
of formulas inside of text (by pylatexenc).
"""

import re
from collections.abc import Callable

from eval.metrics import levenshtein
from eval.metrics.metric import UNPARSED, Metric, Reference, Score, Scores, answers_of, mean, mean_part
from eval.metrics.tables import Table, find_table, teds
from eval.parse_answer import answer_text
from glm4v_jax.errors import DataError


def edit_distance(text: str, reference: Reference, normalize: Callable[[str], str] = str.strip) -> Score:
    """Score 1 less Levenshtein distance by the longer length; case, whitespace and marks count.

    Parts: "edits", "length" of the longer text.

    >>> edit_distance("Invoice 12", {"answer": "Invoice 13"}).value
    0.9
    """
    answer = answer_text(text)
    expected = [normalize(one) for one in answers_of(reference)]
    found = normalize(answer or "")
    edits, length = min(
        ((levenshtein.distance(found, one), max(len(found), len(one))) for one in expected),
        key=lambda pair: pair[0] / max(pair[1], 1),
    )
    parts = {"edits": float(edits), "length": float(length)}
    return Score(0.0, None, parts) if answer is None else Score(1 - edits / max(length, 1), answer, parts)


def aggregate_edit_distance(scores: Scores) -> dict[str, float]:
    """Return the mean as "score"; "edit_distance", the mean distance; "whole", all edits by all lengths."""
    figures = mean(scores)
    edits, length = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("edits", "length"))
    return {**figures, "edit_distance": 1 - figures["score"], "whole": edits / max(length, 1)}


_BREAKS = re.compile(r"\\[tn]|/[tn]")
_NOT_WORDS = re.compile(r"[^\w\u4e00-\u9fff]")


def words_only(text: str) -> str:
    """Return the letters, digits and underscores of a text, as OmniDocBench compares it.

    >>> words_only("Total: 12.50 EUR")
    'Total1250EUR'
    """
    return _NOT_WORDS.sub("", _BREAKS.sub("", text))


_IN_BRACKETS = re.compile(r"\\\[(.+?)(?<!\\)\\\]")
_LAYOUT = re.compile(r"\\(?:tag|hspace|begin|end)\{.*?\}|\\arraycolsep.*?\}")
_STYLES = [
    *("mathbf", "mathrm", "mathnormal", "mathit", "mathbb", "mathcal", "mathscr", "mathfrak", "mathsf", "mathtt"),
    *("textbf", "text", "boldmath", "boldsymbol", "operatorname", "bm", "symbfit", "mathbfcal", "symbf"),
    *("scriptscriptstyle", "notag", "setlength", "coloneqq", "space", "thickspace", "thinspace", "medspace"),
    *("nobreakspace", "negmedspace", "quad", "qquad", "enspace", "substackw", "left", "right", "displaystyle"),
]
_STYLE = re.compile(rf"\\(?:{'|'.join(_STYLES)})| |\$\$")


def plain_formula(text: str) -> str:
    r"""Return a formula without styles, spacing, environments, numbers and case, as OmniDocBench compares it.

    >>> plain_formula(r"\[ \mathbf{X} = \left( a \right) \tag{1} \]")
    '{x}=(a)'
    """
    text = text.strip().strip("$").strip("\n")
    if match := _IN_BRACKETS.search(text):
        text = match[1].strip()
    return _STYLE.sub("", _LAYOUT.sub("", text).strip(".")).lower()


def table_similarity(text: str, reference: Reference, is_plain: bool = False) -> Score:
    """Score TEDS of the first table of an answer; parts: "structure", the same without contents of cells (TEDS-S).

    >>> table_similarity("<table><tr><td>1</td></tr></table>", {"answer": "<table><tr><td>2</td></tr></table>"})
    Score(value=0.5, parsed='<table><tr><td>1</td></tr></table>', parts={'structure': 1.0})
    """
    expected = [_expected_table(answer, is_plain) for answer in answers_of(reference)]
    answer = answer_text(text)
    found = None if answer is None else find_table(answer, is_plain)
    if found is None:
        return UNPARSED
    value, structure = max((teds(found, one), teds(found, one, is_structure=True)) for one in expected)
    return Score(value, answer, {"structure": structure})


def _expected_table(answer: str, is_plain: bool) -> Table:
    table = find_table(answer, is_plain)
    if table is None:
        raise DataError(f"answer: found {answer[:80]!r}; expected a table in HTML")
    return table


def aggregate_table_similarity(scores: Scores) -> dict[str, float]:
    """Return the mean as "score", and that without contents of cells as "structure"."""
    return {**mean(scores), "structure": mean_part(scores, "structure")}


_OMNIDOCBENCH = "OmniDocBench 1.5 (arXiv 2412.07626)"

_EDIT_DISTANCE = Metric(
    "edit_distance", edit_distance, aggregate_edit_distance, "normalised edit distance, Levenshtein / longer length"
)
_TEDS = Metric(
    "teds", table_similarity, aggregate_table_similarity, "TEDS of PubTabNet (arXiv 1911.10683); <th> is compared too"
)

METRICS = (
    _EDIT_DISTANCE,
    _EDIT_DISTANCE.variant("edit_distance-omnidocbench", f"{_OMNIDOCBENCH}, Edit_dist of text", normalize=words_only),
    _EDIT_DISTANCE.variant(
        "formula_edit_distance", f"{_OMNIDOCBENCH}, Edit_dist of display formulas", normalize=plain_formula
    ),
    _TEDS,
    _TEDS.variant("teds-omnidocbench", f"{_OMNIDOCBENCH}, TEDS; PubTabNet's of normalised tables", is_plain=True),
)
