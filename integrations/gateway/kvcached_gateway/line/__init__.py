"""Requests that wait for their engines, and whose turn it is."""
