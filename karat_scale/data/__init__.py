"""From shards to an exact sequence of batches: order, plan, reading, decoding, augmentation, mixing."""
