"""From samples to a checkpoint."""
