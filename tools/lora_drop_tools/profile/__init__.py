"""`lora-drop profile`: which layers can be dropped."""
