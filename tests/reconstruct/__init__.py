"""Reconstruction, against named cases and a slow oracle."""
