"""How a model is sampled: what each method needs of a checkpoint, and the plan it gives."""
