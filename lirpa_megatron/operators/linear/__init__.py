"""Linear layers and other linear operators, all exact."""
