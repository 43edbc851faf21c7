"""The student run by PyTorch: captured inputs, exact outputs, ranges, costs."""
