"""The way through: options, the export from a model's name to a verified bundle, targets added later."""
