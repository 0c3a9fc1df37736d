"""Several channels' candidates become one list."""
