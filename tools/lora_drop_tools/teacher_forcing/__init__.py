"""A text as it would be decoded, all tokens of a layer at once."""
