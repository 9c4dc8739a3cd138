"""What executes the graphs: each target lowers, builds, and says how it is verified."""
