"""Who may hold how much of a device: one file in shared memory for each."""
