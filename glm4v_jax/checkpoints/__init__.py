"""Checkpoints: Hugging Face safetensors and Orbax, read, written and mapped onto the model."""
