"""From files to `Interactions`, or one clear error."""
