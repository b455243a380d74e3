"""Where training states are written to."""
