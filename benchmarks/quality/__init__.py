"""How good pictures are: the yardstick, and what is judged by it."""
