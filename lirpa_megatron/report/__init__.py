"""What a file of results says: its sums, and a page with plots. Needs no torch."""
