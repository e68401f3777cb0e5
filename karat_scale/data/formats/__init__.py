"""The formats of image files: tar shards, betons, folders. Random access, atomic writes, checks against records."""
