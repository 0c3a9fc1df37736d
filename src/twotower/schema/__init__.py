"""What the stages agree on: names of columns, tables and their checks, whole files, errors."""
