"""A version and a request become candidates; events go into the log."""
