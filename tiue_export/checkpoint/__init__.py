"""Checkpoints as they lie on disk: containers, names, families, parts."""
