"""Environments: what answers the policy within an episode, turn by turn."""
