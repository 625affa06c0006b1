"""Kernels behind one signature each, with a slow obvious reference; knows nothing of seer_jax."""
