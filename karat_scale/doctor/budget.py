"""How much of a recipe's step is timed, so that a slow model does not take all day."""

# A step should take at most this share of the time there is.
STEP_SHARE = 1 / 12


def affordable(
    global_batch: int, micro_batch: int, world_size: int, image_seconds: float, seconds: float
) -> tuple[int, int]:
    """(global batch, micro batch) that `seconds` can hold several steps of: those given, or smaller ones.

    image_seconds: of forward and backward over one image on one rank. A micro batch stays even where it must shrink,
    as mixing wants it.
    """
    part, images = global_batch // world_size, int(STEP_SHARE * seconds / image_seconds)
    if images >= part:
        return global_batch, micro_batch
    if images >= micro_batch:
        return images // micro_batch * micro_batch * world_size, micro_batch
    smaller = min(micro_batch, max(2, images // 2 * 2))
    return smaller * world_size, smaller
