"""The bundle on disk: manifest, files, graph inputs and outputs, adapters."""
