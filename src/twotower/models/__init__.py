"""Retrievers, the towers behind one of them, and the losses that train it."""
