"""Staged recipes: a file that names stages, the runner that goes through them, and the jobs between them.

Imports nothing by itself: the runner needs no torch.
"""
