"""What is done to images and batches: drawn first, from seeds, then done by workers or on the device."""
