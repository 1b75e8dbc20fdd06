"""Findings about a model's BatchNormalization: rules in one table, facts found out on demand."""
