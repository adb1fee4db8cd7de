"""From image files to batches of uint8 tensors."""
