"""Batches of prompts from a file into a file of completions that can be resumed."""
