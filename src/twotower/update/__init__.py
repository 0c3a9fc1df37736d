"""What learns while a version is served: deltas through the day, a full version every night."""
