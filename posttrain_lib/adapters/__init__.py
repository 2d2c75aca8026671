"""The edge: the only files that import a host (Metaflow, vLLM, verl, transformers' models)."""
