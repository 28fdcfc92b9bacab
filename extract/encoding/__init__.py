"""Encoders at work: models that a library loaded, with preprocessing, layers, a device and a backend."""
