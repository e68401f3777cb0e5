"""Turn shards into an exact sequence of batches: order, plan, reading, decoding, augmentation, mixing."""
