"""Data larger than memory: a table becomes a task store, which training streams."""
