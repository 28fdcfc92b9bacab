"""Settings: their schema, their defaults, and the YAML files that hold them."""
