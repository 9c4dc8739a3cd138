"""Constraints of what a row may write: JSON schemas, regular expressions, grammars, tool calls."""
