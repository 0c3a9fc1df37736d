"""The two towers: encoders, embedding tables, losses; and the rankers."""
