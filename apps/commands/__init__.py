"""The commands, one file for each group; each imports its code when it runs: help stays fast."""
