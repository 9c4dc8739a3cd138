"""Tensors → `weights/` of the bundle, once. Knows no graph."""
