"""Drawing pictures from a bundle: tokens, the chain of graphs, pixels. Light."""
