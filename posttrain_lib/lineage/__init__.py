"""Artifact store, content keys and what they are made of."""
