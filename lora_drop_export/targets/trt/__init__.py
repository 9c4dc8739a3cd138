"""TensorRT and TensorRT-RTX: static capacities, weights as inputs, engines."""
