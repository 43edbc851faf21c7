"""Drawing from the command line: one prompt, or tables of them."""
