"""Many methods under many seeds in one table."""
