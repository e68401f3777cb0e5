import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import EvalPlan, TrainPlan
from karat_scale.recipe import AugmentConfig, DataConfig


def backend(samples: int = 50, size: int = 20, classes: int = 7, seed: int = 0):
    config = DataConfig(backend="synthetic", synthetic_samples=samples)
    return open_backend(ImageSpec(config, AugmentConfig(), size, classes, seed))


def test_images_depend_on_the_sample_alone():
    source = backend()
    (whole,) = source.train_batches(TrainPlan(0, 50, 50, 50, 0, 1).slices(0, 1))
    (later,) = source.train_batches(TrainPlan(9, 50, 50, 50, 0, 1).slices(3, 4))
    assert whole.sample_ids.tolist() != later.sample_ids.tolist()
    assert torch.equal(whole.images[whole.sample_ids.argsort()], later.images[later.sample_ids.argsort()])
    assert whole.labels.tolist() == [i % 7 for i in whole.sample_ids.tolist()]
    assert len({image.numpy().tobytes() for image in whole.images}) == 50
    assert whole.images.dtype == torch.uint8


def test_seeds_and_splits_differ_and_classes_can_be_told_apart():
    (one,) = backend().eval_batches(EvalPlan(50, 64, 0, 1).slices())
    (two,) = backend(seed=1).eval_batches(EvalPlan(50, 64, 0, 1).slices())
    assert one.valid.sum() == 50
    assert not one.images[~one.valid].any()
    assert not torch.equal(one.images, two.images)
    source = backend(samples=280)
    (train,) = source.train_batches(TrainPlan(0, 280, 280, 280, 0, 1).slices(0, 1))
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(7)])
    (val,) = source.eval_batches(EvalPlan(280, 280, 0, 1).slices())
    nearest = torch.cdist(val.images.flatten(1).float(), means.flatten(1)).argmin(1)
    assert (nearest == val.labels).float().mean() == 1
