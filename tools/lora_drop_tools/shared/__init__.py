"""What several commands share; no command imports another."""
