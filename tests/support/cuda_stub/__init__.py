"""CUDA libraries that execute nothing, and what runs a bundle on ONNX Runtime's own CUDA provider over them."""
