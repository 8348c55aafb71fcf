"""Engines as processes: what has to be known of each, its start, its end, its adoption."""
