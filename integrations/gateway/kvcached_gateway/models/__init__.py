"""Each model: its state, its leases, and the task that starts, watches and ends its engine."""
