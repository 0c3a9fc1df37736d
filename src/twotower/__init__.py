"""Open two-tower retrieval: from click logs to a served, continuously updated candidate list."""
