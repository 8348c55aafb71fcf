"""What the gateway knows of each kind of engine: its command line, its paths, its counters."""
