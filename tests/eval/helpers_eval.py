"""Images, and runs made without a model."""

import io
import json
from collections import Counter

import PIL.Image

from eval.data.items import Item
from eval.results import RESULTS, SUMMARY, ItemResult, write_results

INJECTION = '<script>window.broken = 1</script><img src=x onerror="window.broken = 2">\'"&{{ 7 * 7 }}</pre></article>'


def png(width=200, height=100, colour="white"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def item(id="a", question="What?", reference=None, media=(), group=None):
    content = [*media, {"type": "text", "text": question}]
    return Item(id, [{"role": "user", "content": content}], reference or {"answer": "7"}, {"prompt": question}, group)


def result(item, output="<answer>7</answer>", score=1.0, parsed="7", category="scored", **fields):
    return ItemResult(
        id=item.id, question=item.question, group=item.group, reference=item.reference, output=output, parsed=parsed,
        score=score, parts=fields.pop("parts", {}), category=category, **fields,
    )  # fmt: skip


def summary_of(results, **fields):
    """A summary as `eval.summary` makes it, with an interval that is not computed."""
    scores = [result.score for result in results]
    counts = Counter(result.category for result in results)
    groups = sorted({result.group for result in results} - {None})
    mean = sum(scores) / len(scores)
    return {
        "score": mean, "task": "digits-grounding", "metric": "box_iou", "mean": mean,
        "interval": [max(mean - 0.05, 0), min(mean + 0.05, 1)], "confidence": 0.95, "count": len(results),
        "clusters": len(results), "parts": {"mean_iou": 0.625},
        "groups": {group: {"mean": 0.5, "count": sum(of.group == group for of in results)} for group in groups},
        "rates": {name: counts[name] / len(results) for name in ("parse_failure", "no_answer", "truncated", "error")},
        "truncated_share": sum(result.is_truncated for result in results) / len(results),
        "tokens": {"prompt": 10, "new": 20}, "items": "0123456789abcdef", "model": "models/tiny", "dtype": "float32",
        "preset": "greedy", "options": {"max_new_tokens": 64}, "versions": {"jax": "0.10.2"}, **fields,
    }  # fmt: skip


def write_run(directory, results, **fields):
    directory.mkdir(parents=True, exist_ok=True)
    write_results(results, directory / RESULTS)
    (directory / SUMMARY).write_text(json.dumps(summary_of(results, **fields)), encoding="utf-8")
    return directory
