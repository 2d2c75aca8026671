"""Reinforcement learning: the roles, what samples are worth, the embedded rollout engine, constraints. No Ray, no host."""
