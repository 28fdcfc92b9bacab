"""Metrics, baselines, indexes and search over embeddings files, without torch and whatever made the embeddings."""
