"""Chat templates, run with limits."""
