"""Stage 2: projection heads are fitted on cached features."""
