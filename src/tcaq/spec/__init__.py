"""What to do, as frozen pydantic models that round-trip JSON."""
