"""What is stored on disk or sent between processes: plain dataclasses, no torch, no pydantic."""
