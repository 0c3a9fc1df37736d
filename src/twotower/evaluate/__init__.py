"""How good a list is, and how sure one can be."""
