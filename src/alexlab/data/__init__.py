"""Image folders -> batches of uint8."""
