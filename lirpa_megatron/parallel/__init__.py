"""Process groups, guarded collectives, agreement between ranks, layouts of A."""
