"""`lora-drop fit`: adapters for a drop list."""
