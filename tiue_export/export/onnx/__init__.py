"""ONNX graphs, and the bundle that holds them."""
