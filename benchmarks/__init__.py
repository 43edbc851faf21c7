"""Measurements at full size. Run one as python -m tiue_export.benchmarks.NAME --help."""
