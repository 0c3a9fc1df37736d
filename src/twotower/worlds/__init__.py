"""Simulated worlds whose users' true interests are known."""
