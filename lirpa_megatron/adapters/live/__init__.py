"""The live model: its own modules, run undisturbed and compared with the graph."""
