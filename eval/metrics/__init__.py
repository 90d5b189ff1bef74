"""Metrics that need no judge: functions from what a model wrote and a reference to a score, by name in `METRICS`.

metric.py     what a metric is, and what all of them share
levenshtein.py  edit distances
text.py       exact match, ANLS, character and word error rates
boxes.py      RefCOCO's accuracy and mean IoU; F1 of several boxes
points.py     ScreenSpot's clicks
choices.py    letters of multiple choice, MMBench, Video-MME
charts.py     ChartQA, ChartQAPro
vqa.py        VQA accuracy
ocr.py        OCRBench
documents.py  edit distance of text and formulas, TEDS of tables
tables.py     tables in HTML as trees, and their edit distance
mathvista.py  MathVista
mmmu.py       MMMU

Fields of a reference, of which each metric's module names those that it reads:

- "answer": the right answer, a text, number or option's letter; "answers": several, as a list, where a metric says so.
- "boxes": [[x1, y1, x2, y2], ...] in pixels of the original image; "width", "height": of that image.
- "options": {letter: text}, or a list of texts for A, B, C, ...
- "type", "split", "group", "subject", "duration", ...: groups of which an aggregate has figures.

Where harnesses differ, each way is a metric of its own, "name-harness"; the name alone is the definition's. In every
metric thoughts are skipped, a box wins over the rest of the answer (but for OCRBench and documents), what cannot be
parsed scores 0 with `parsed` None, and a reference that lacks a field is a `DataError`.

>>> METRICS["anls"].score("<answer>A total of <|begin_of_box|>12 eur<|end_of_box|></answer>", {"answer": "12 EUR"})
Score(value=1.0, parsed='12 eur', parts={})
"""

from collections.abc import Mapping

from eval.metrics import boxes, charts, choices, documents, mathvista, mmmu, ocr, points, text, vqa
from eval.metrics.metric import Metric, Reference, Score, Scores

__all__ = ["METRICS", "Metric", "Reference", "Score", "Scores"]

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for module in (boxes, charts, choices, documents, mathvista, mmmu, ocr, points, text, vqa)
    for metric in module.METRICS
}
