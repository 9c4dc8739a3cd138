"""Block formats and rounding: no model and no graph."""
