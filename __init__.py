"""Image-text retrieval: encode a dataset once, fit projection heads over and over."""

__version__ = "0.2.0"
