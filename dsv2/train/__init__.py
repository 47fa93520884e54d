"""Training: schedule, optimizer, step, evaluation, checkpoints, metrics, and the loop that joins them."""
