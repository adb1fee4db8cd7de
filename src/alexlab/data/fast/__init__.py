"""Faster ways to the images: prepared shards, archives, the crop on the GPU, the device cache, the folder cache."""
