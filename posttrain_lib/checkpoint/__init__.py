"""Weights and training state on disk: Hugging Face folders, verification, resumable checkpoints."""
