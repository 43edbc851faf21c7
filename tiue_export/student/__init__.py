"""The student in PyTorch: loading it, merging adapters, writing it as a pipeline folder."""
