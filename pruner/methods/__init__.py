"""One pruning method per file, all behind one signature."""
