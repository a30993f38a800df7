"""Linear layers, and everything else that is linear and thus exact."""
