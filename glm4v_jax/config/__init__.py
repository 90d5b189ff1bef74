"""What a checkpoint says about the model and about generation, checked; imports no JAX."""
