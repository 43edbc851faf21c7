"""Proof: what is measured against the reference, and the gates it has to pass. Light."""
