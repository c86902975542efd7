"""What was measured of a model: its documents, and the page that shows them. Runs no model."""
