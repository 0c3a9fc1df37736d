"""A checkpoint becomes an immutable version that servers can switch to and back."""
