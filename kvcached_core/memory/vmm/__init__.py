"""Virtual memory: one protocol, its backends, and layers over them."""
