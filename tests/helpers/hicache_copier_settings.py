"""The variables by which a test tells the copier of `hicache_copier` what to do."""

DELAY_MS, SEED, REPORT, GATE, SPOILED, DEFECT = (
    f"HICACHE_{word}" for word in ("DELAY_MS", "SEED", "REPORT", "GATE", "SPOILED", "DEFECT")
)
UNMAPPED = "unmapped"  # the defect that what is loaded into is mapped when the schedule ends
