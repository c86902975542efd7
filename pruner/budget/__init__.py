"""A format for every linear, such that the whole model keeps to a budget of quality or bytes."""
