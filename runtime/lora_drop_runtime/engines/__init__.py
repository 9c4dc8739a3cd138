"""What runs the step graphs: the protocol, the one place that chooses, a folder for each engine."""
