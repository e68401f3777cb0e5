"""Augmentation of images and batches: drawn first, from seeds, then applied by workers or on the device."""
