"""Reinforcement learning: roles, controller, advantages, the embedded engine, graders, constraints. No Ray, no host."""
