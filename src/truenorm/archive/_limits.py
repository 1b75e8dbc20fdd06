"""What a model in a file may have: apart from what loads it, since the command shows it."""

MOST_PARAMETERS = 200_000_000
"""What a model may have unless more is allowed: more than any model with BatchNormalization that
Keras brings along."""
