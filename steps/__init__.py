"""Versioned steps: plain functions from config and input references to a published result.

Each runs alone as ``python -m steps.<name> --config configs/...``; flows only chain them.
"""
