"""A model repository for the Triton Inference Server."""
