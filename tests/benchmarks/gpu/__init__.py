"""The measurements of ``infra/gpu_suite.py``: one module a part, each with a command line of its own."""
