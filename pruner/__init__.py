"""Dense checkpoint in, sparse checkpoint out. Knows one decoder block at a time."""
