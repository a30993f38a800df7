"""Functions of one number, or of two, number by number."""
