"""Tasks through lm-eval on local files."""
