"""Other runtimes beside a bundle, each in a process of its own."""
