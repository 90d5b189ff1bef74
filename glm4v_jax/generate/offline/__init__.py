"""Many prompts from a file into a file of answers, in a way that an interrupted run can resume.

- `prompts`: reads a JSON-lines file of prompts and checks all of them before a model is loaded.
- `batch`: runs prompts through the engine, and sums up the run.
- `answer_file`: the file that answers are appended to; in several processes, the first one writes it.
"""
