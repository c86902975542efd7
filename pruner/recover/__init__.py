"""Training a pruned checkpoint back towards its dense parent, masks and formats kept."""
