"""`lora-drop eval`: quality under a schedule."""
