"""Settings of every test: CPU unless asked otherwise, and the same examples in every run."""

import os

import hypothesis

# Read by jax at its first use. A machine with an accelerator can still be asked for: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

hypothesis.settings.register_profile("seer_jax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("seer_jax")
