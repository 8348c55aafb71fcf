"""Weights that can be given to neighbours: where they lie, their copy, and how they come back."""
