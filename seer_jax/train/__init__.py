"""Training: rewards, advantages, losses, microbatches, the learner, checkpoints, and the loop that joins them."""
