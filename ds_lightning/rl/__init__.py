"""Reinforcement learning apart from the gradient: tasks, rewards scored in isolated processes, advantages.

Imports nothing by itself: scoring processes start from here and load no torch.
"""
