"""From users, items and events to what training reads: positives, histories, counts, encoded features."""
