"""Results that are there as a whole or not at all: a directory, or one file; see directory.py and file.py."""
