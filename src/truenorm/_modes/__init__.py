"""Which mode a BatchNormalization is in, observed; and freezing it."""
