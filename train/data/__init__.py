"""Training data, from files to the batches of steps.

- records.py: `Record`, a conversation, read from any file by its number. Formats of rows: formats.py, conversations.py
  (what they have in common), tools.py (functions, calls and answers), grounding.py (boxes), preferences.py (a preferred
  and a rejected answer) and dataset_info.py (LLaMA-Factory's file of column names).
- samples.py: `Sample`, a record as tokens, targets and patches. turns.py: which turns of a record are targets.
- encoder.py: `Encoder`, the number of a record -> its sample, or why it has none.
- stream.py: `Stream`, the batches of steps, in an order that a seed decides; packing.py makes batches of samples, and
  placement.py shards them over a mesh. epochs.py counts the steps that epochs take.
- check.py, lengths.py, histogram.py: `glm4v train check`.
"""

from typing import Literal

FormatName = Literal["openai", "sharegpt", "alpaca", "swift", "hf", "llava", "finevision"]
"""Formats of rows; here, because the command line must not import all that reads them."""
