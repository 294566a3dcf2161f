"""Files: folders here and in object storage, weights, checkpoints."""
