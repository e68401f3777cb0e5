from karat_scale.foundation.machine import GPUS, find_gpu, known_gpu


def test_a_name_that_cuda_reports_finds_its_gpu_unless_it_is_a_slice_or_a_variant() -> None:
    for name, key in {
        "NVIDIA H100 80GB HBM3": "h100-80",
        "NVIDIA H100 PCIe": "h100-pcie-80",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA A10": "a10-24",
        "NVIDIA A10G": "a10g-24",
        "NVIDIA L4": "l4-24",
        "NVIDIA L40S": "l40s-48",
        "NVIDIA GeForce RTX 4090": "rtx4090-24",
        "Tesla V100-SXM2-32GB": "v100-32",
        "Tesla T4": "t4-16",
    }.items():
        found = find_gpu(name)
        assert found is not None
        assert found.key == key
        assert find_gpu(key) is found
    for name in ("A100-SXM4-80GB MIG 3g.40gb", "A100-SXM-64GB", "GeForce RTX 4090 Laptop GPU", "RTX A4000", "T400"):
        assert find_gpu(f"NVIDIA {name}") is None
    assert find_gpu("") is None
    for name, key in {"h100": "h100-80", "A100": "a100-80", "rtx4090": "rtx4090-24"}.items():
        assert known_gpu(name).key == key


def test_the_table_is_in_units_of_one_and_orders_precisions() -> None:
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        peaks = list(gpu.peaks.values())
        assert peaks == sorted(peaks), gpu.key
        assert all(1e12 < peak < 1e16 for peak in peaks), gpu.key
        assert 1e10 < gpu.memory_bytes < 1e12, gpu.key
        assert 1e11 < gpu.bandwidth < 1e13, gpu.key
        # The key ends with the sheet's gigabytes, of which CUDA reports a little less.
        assert 0.85 < gpu.memory_bytes / (int(gpu.key.rsplit("-")[-1]) * 2**30) <= 1, gpu.key
