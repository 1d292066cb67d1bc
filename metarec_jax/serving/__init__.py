"""A trained method at work: adapt to a user, score the catalogue, say why."""
