"""Stage 1: encodes a captioned-image dataset once into an HDF5 feature store."""
