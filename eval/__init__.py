"""Evaluation of GLM-4.1V: judge-free scores of a checkpoint, resumable, with a report.

commands.py          `python -m eval`: run, compare, tasks
tasks.py             what is asked, in which words, and how it is scored; catalogue.py has the tasks of the package
read_items.py        the items of a task, from files of data
parse_answer.py      letters, numbers, boxes and points in what a model wrote
results.py           the files of a run, and the result of every item
summary.py           the figures of a run
statistics.py        confidence intervals
compare.py           two runs item by item; compare_command.py prints it
lmms.py              the engine as a model of lmms-eval
data/ metrics/ report/
"""
