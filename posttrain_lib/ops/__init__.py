"""Tensor operations behind one signature each: a readable reference (``reference.py``) and the fast version."""
