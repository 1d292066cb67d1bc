"""Serving a trained method: adapt to a user, score the catalogue, explain the scores."""
