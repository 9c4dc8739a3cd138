"""Which sites are dropped, when a refresh comes, and what becomes of the K/V that LoRA steps leave out."""
