"""Runtimes: each file opens a bundle on one backend as a `tiue_export.specs.Runtime`.

A runtime checks nothing that the pipeline checks already (specs, finiteness); it loads each graph
on first use, returns arrays that belong to the caller, and imports no torch, but for the reference.
"""
