"""Modules whose ``forward`` is the paper's equations in the paper's order."""
