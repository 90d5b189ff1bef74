"""Metrics that need no judge: functions from what a model wrote and a reference row to a score, by name in `METRICS`.

Fields of a row, of which each metric's module names those that it reads:

- "answer": the right answer, a text, number or option's letter; "answers": several, as a list, where a metric says so.
- "boxes": [[x1, y1, x2, y2], ...] in pixels of the original picture; "width", "height": of that picture.
- "options": {letter: text}, or a list of texts for A, B, C, ...
- "type", "split", "group", "subject", "duration", ...: parts by which an aggregate tells its figures.

Where harnesses differ, each way is a metric of its own, "name-harness"; the name alone is the definition's. Whatever
the metric, thoughts are left out, a box wins over the rest of the answer (but for OCRBench), and what cannot be
understood scores 0 with `parsed` None.
"""

from collections.abc import Mapping

from eval.metrics import boxes, charts, choices, mathvista, mmmu, ocr, points, text, vqa
from eval.metrics.metric import Item, Metric, Score, Scores

__all__ = ["METRICS", "Item", "Metric", "Score", "Scores"]

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for module in (boxes, charts, choices, mathvista, mmmu, ocr, points, text, vqa)
    for metric in module.METRICS
}
