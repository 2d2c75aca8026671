"""The tests. A package: some installed libraries bring a ``tests`` of their own, which would win in subprocesses."""
