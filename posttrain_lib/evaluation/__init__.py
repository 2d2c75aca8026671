"""Held-out loss, greedy generation, answer checks."""
