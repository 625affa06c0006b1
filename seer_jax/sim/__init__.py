"""Simulation of rollouts at the paper's scale: the real scheduling over a model of the hardware. Imports no jax."""
