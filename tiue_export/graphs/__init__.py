"""Student -> graphs: the UNet cut in two, what depends on no timestep hoisted, dtypes lowered."""
