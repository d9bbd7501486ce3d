"""What the training loop calls, and what a run leaves behind."""
