"""Training: the loss, the loop, averages of the weights, checkpoints and the log."""
