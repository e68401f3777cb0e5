import numpy as np

from karat_scale.data.augment import TrainTransform
from karat_scale.data.finish import BatchFinisher
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import BatchSlice
from karat_scale.recipe import AugmentConfig


def test_a_batch_is_finished_as_its_samples_one_by_one():
    transform = TrainTransform(AugmentConfig(erasing=0.5), 16)
    part = BatchSlice(epoch=3, batch=0, sample_ids=np.array([5, 0, 9, 5]))
    sizes = [(40, 30), (20, 20), (17, 90), (40, 30)]
    views = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    results = []
    for threads in (1, 3):
        finisher = BatchFinisher(transform, seed=8, threads=threads)
        draws = finisher.draw(part, sizes)
        results.append(finisher.finish(views, draws).numpy())
        finisher.close()
    assert draws == tuple(
        transform.draw(sample_seed(8, 3, i), *size) for i, size in zip([5, 0, 9, 5], sizes, strict=True)
    )
    assert draws[0] == draws[3]
    expected = [transform.finish(view, draw) for view, draw in zip(views, draws, strict=True)]
    assert np.array_equal(results[0], np.stack(expected))
    assert np.array_equal(results[1], results[0])
