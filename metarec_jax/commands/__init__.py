"""What the commands do, a file each. Text goes to stdout, progress to stderr; --json puts one object last."""
