"""The converter between Hugging Face safetensors and Orbax checkpoints: `python -m convert`, `glm4v convert`."""
