"""Fine-tuning: data, the training step, jobs that can be resumed, and export."""
