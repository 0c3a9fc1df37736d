"""Nearest neighbours of a user's vector among the vectors of items.

Dimensions here: N vectors, D their length, B queries, k neighbours each.
"""
