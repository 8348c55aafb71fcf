"""Observe, decide, act: who starts where, who is stopped for it, who moves."""
