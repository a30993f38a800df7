"""Plain modules: torch's functions and layers as operators of the graph while it is traced."""
