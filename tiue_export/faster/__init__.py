"""Faster Diffusion: the encoder at key steps, the decoders of the steps between as one batch."""
