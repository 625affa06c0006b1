"""Decoders of the DeepSeek-V3 family as plain functions over a parameter pytree; the same for training and rollout."""
