"""Image files: tar shards, betons, folders, shards at a URL. Random access, atomic writes, checks against records."""
