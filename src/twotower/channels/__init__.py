"""Channels: what retrieves candidates for a request, and the protocol that they share."""
