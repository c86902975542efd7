"""The numerical steps behind our own method, each for one linear, each against its own oracle."""
