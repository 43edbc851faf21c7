"""Applications on top of the hub: the command line and what it calls."""
