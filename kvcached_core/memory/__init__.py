"""Bytes and mapping: what a worker's side does."""
