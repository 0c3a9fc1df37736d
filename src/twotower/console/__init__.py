"""The page: a user's history and recommendations, for people."""
