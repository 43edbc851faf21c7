"""Measurements behind the manual."""
