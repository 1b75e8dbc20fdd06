"""The population statistics of a model over a data set."""
