"""Graders, and the processes in which they may hang, crash and lie at the cost of one answer each."""
