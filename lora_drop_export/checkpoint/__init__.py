"""What the user named → config, and tensors where they lie: Hugging Face, GGUF, drop lists."""
