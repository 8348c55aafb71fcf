"""The command `kvcached`. It reads the ledger; it imports neither torch nor an engine."""
