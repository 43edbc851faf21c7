"""Core ML: on Apple devices, and its packages evaluated elsewhere."""
