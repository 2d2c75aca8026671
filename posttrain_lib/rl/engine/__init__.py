"""The embedded rollout engine: continuous batching over our own model definitions, in this process."""
