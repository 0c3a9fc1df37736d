"""Experiments that test the claims behind the system, on worlds whose truth is known and on real logs."""
