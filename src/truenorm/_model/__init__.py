"""Reading, rebuilding and running Keras models."""
