"""Fast paths of the input: prepared shards, archives, the crop on the GPU, caches."""
