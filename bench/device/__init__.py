"""Figures of an accelerator in nine minutes: `python -m bench.device`; their page: `python -m bench.page device`.

`table` judges figures, `chart` draws them, `work` has the workloads on paper; `model`, `kernels`, `generate` and
`train` measure them in a process that `worker` runs, and `__main__` watches.
"""
