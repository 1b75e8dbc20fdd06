"""The BatchNormalization layer."""
