"""ONNX Runtime: one graph for both steps."""
