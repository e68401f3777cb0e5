"""The size of the timed step, so that a slow model does not take too long."""

# A step should take at most this share of the available time.
STEP_SHARE = 1 / 12


def affordable(
    global_batch: int, micro_batch: int, world_size: int, image_seconds: float, seconds: float
) -> tuple[int, int]:
    """Return (global batch, micro batch) of which several steps fit into `seconds`: the given ones, or smaller ones.

    image_seconds: of forward and backward over one image on one rank. A micro batch that shrinks stays even, as mixing
    needs it.
    """
    part, images = global_batch // world_size, int(STEP_SHARE * seconds / image_seconds)
    if images >= part:
        return global_batch, micro_batch
    if images >= micro_batch:
        return images // micro_batch * micro_batch * world_size, micro_batch
    smaller = min(micro_batch, max(2, images // 2 * 2))
    return smaller * world_size, smaller
