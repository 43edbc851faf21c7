"""The commands, one file a verb; each imports its code when it runs: help stays fast."""
