"""A scheduler's side of an engine, in no engine's words."""
