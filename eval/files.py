"""What the files of a run are called, in its directory."""

ANSWERS = "answers.jsonl"
"""What the model said, a line each; written as it comes."""

RESULTS = "results.jsonl"
"""What was understood of that, and its score, a line each; see `eval.results`."""

SUMMARY = "summary.json"
"""The figures; see `eval.summary`. Beside the directories of several tasks, their scores."""

REPORT = "report.html"
"""All this as a page; see `eval.report.report`."""
