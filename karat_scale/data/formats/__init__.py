"""Where the images lie: tar shards, betons, folders; read at random, written whole, checked against their records."""
