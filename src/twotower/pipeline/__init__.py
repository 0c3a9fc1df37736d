"""All stages in their order, as a configuration describes them."""
