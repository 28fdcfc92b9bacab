"""Metrics, baselines and search over embeddings files. Knows neither torch nor how embeddings are made."""
