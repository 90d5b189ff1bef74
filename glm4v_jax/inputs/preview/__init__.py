"""What the model will see of a file, as facts and as an image."""
