"""Tokenizer, chat template and the expansion of placeholders."""
