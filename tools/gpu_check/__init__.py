"""What `python tools/gpu_check.py` runs: command.py, and a file for each stage."""
