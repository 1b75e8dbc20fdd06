"""A new model from an old one: replace, place, fold."""
