"""What the gateway knows of each engine."""
