"""Measurements against named peers: both sides in one process, in turns, on the same weights."""
