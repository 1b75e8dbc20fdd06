"""What records look like: each drawing is data, and knows how to paint itself on Axes."""
