"""Room for programs that are no engines: announced, counted while they run, given back."""
