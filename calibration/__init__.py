"""Calibration data and quantization (to come); nothing is exported from here yet."""
