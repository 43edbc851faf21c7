"""Core ML programs (MIL), read and executed on any operating system."""
