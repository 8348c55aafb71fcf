"""Real engines as child processes: how they are started, asked, watched and ended."""
