"""Scripts that only reproduce tables of docs/."""
