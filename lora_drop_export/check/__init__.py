"""Is the bundle right, and what did it cost: the reference, the comparison with it, calibration, perplexity."""
