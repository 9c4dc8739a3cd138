"""`lora-drop bench`: speed, memory and the ceiling."""
