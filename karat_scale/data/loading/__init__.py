"""From ids to batches on a device: worker processes, what is fetched ahead, assembly."""
