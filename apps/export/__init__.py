"""From a checkpoint or a bundle to graphs: what the export commands share, and their tables."""
