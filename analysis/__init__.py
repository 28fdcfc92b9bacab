"""Figures and descriptions of stored files; no model is loaded."""
