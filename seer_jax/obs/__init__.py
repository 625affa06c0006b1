"""Seeing a run: metrics, progress, tables, run directories. Never imports jax, flax or ray."""
