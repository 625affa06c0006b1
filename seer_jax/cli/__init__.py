"""The command line `seer-jax <verb>`: arguments in, one job run, results out. No logic of its own."""
