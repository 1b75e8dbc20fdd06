"""The demo: all of truenorm on one real data set, step by step, with explanations."""
