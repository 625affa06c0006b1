"""Configuration: declared in `schema`, read by `presets` and `decode`, checked by `validate`, written by `dump`."""
