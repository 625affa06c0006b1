"""Checkpoints in Hugging Face's format, to and from our parameter tree."""

from seer_jax.weights.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
