"""Distribution stands beside the model: process groups, meshes and how a model is laid over them."""
