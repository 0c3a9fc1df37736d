"""Public data sets, your own files and a simulated world, all as one kind of workspace."""
