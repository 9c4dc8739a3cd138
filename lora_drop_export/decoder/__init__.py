"""A transformers model: its anatomy, what is refused, the trace, the attention interface, eager runs layer by layer."""
