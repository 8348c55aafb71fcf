"""What answers on the public port: paths, keys, limits, bytes through, worker processes."""
