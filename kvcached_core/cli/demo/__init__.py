"""`kvcached demo`: two real engines share one pool, and you watch."""
