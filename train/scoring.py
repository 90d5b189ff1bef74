"""How far answers are what they should be: metrics of `eval` for which a record's own answer is reference enough."""

from eval.metrics import METRICS
from eval.parse_answer import final_answer
from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.boxes import find_boxes


def score(metric: str, answer: str, expected: str) -> float:
    """From 0 to 1.

    Args:
      metric: a name of `config.MetricName`.
      answer: all that was generated.
      expected: what the record's assistant says, thought and tags included.

    Raises:
      DataError: what is expected is nothing for this metric.
    """
    found = final_answer(expected)
    if found is None:
        raise DataError(f"{metric}: found no answer in {expected!r}; expected one")
    item = {"answer": found, "boxes": [list(box) for box in find_boxes(expected)], "width": 1000, "height": 1000}
    return METRICS[metric].score(answer, item).value
