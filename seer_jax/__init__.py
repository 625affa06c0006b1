"""Synchronous LLM reinforcement learning with Seer's rollout, in JAX.

Importing this package imports no jax: the command line, the controller and the simulator start without a device.
"""

__version__ = "0.1.0"
