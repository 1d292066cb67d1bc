"""One run, from options to a directory."""
