"""Decisions as pure functions: values and `now` in, decisions with their reasons out."""
