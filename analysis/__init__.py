"""Figures from stored files alone; no model is loaded."""
