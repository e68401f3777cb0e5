"""The shards of the `webdataset` backend, decoded by DALI.

DALI's readers keep no exact order, its random crops draw from a stream of their own, and its epochs vary in length. So
it only decodes.
"""

import torch

from karat_scale.data.backends.base import ImageSpec
from karat_scale.data.backends.batch_decoding import BatchDecodingBackend, gpu_in_use
from karat_scale.data.backends.dali_pipeline import DaliDecoder, require_dali
from karat_scale.data.backends.images import open_shards


def open_dali(spec: ImageSpec) -> BatchDecodingBackend:
    """Open shards for DALI. Raises RecipeError if DALI is not installed, and DataError if the shards are not right.

    Batches that the CPU augments are decoded there too: the pixels would only travel to the GPU and back.
    """
    require_dali()
    gpu = gpu_in_use()
    stream = None if gpu is None else torch.cuda.Stream(gpu)
    threads, interpolation = max(1, spec.data.workers), spec.augment.interpolation

    def make_decoder(only_flips: bool) -> DaliDecoder:
        if only_flips and gpu is not None:
            return DaliDecoder(threads, interpolation, gpu, spec.image_size, stream)
        return DaliDecoder(threads, interpolation)

    return BatchDecodingBackend(open_shards(spec), spec, make_decoder, stream)
