"""Figures of an accelerator in nine minutes: `python -m bench.device`, and the page of them, `bench.device.page`.

`table` judges figures, `work` has the workloads on paper; `model`, `kernels`, `generate` and `train` measure them in a
process that `worker` runs, and `__main__` watches.
"""
