"""Reinforcement learning: what samples are worth. No rollout engine, no Ray, no host."""
