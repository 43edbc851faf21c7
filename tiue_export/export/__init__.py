"""Exporters: each turns a student (or a bundle) into a bundle, and proves what it did."""
