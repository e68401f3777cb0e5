import torch

from karat_scale.data.augmentation.device_augment import Normalize


def test_normalize_is_torchvisions():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    result = Normalize(mean, std)(images)
    assert result.dtype == torch.float32
    expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
