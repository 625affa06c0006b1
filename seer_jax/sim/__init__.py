"""A cluster simulated with the real scheduling, buffer and page-pool code; knows neither jax nor ray."""
