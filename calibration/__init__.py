"""int8: what real prompts feed the UNet, the plan made from it, the graphs and their verdict."""
