"""Evaluation of GLM-4.1V: judge-free scores of a checkpoint, resumable, with a report."""
