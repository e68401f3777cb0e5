"""Shards in object stores and on web servers: what is read of them is kept on a disk of the node."""
