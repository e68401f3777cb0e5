"""A CUDA driver that loads and launches nothing, so that Triton compiles and binds kernels for absent GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import max_shared_mem
from triton.runtime import driver

# Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, technical
# specifications by compute capability).
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}


class Launched(NamedTuple):
    """A launch: the kernel's name, its number of programs and the tensors it was given."""

    name: str
    programs: int
    tensors: tuple[Any, ...]


class FakeDriver:
    """What Triton needs of a driver, for one architecture.

    `launches` holds all launches in order. `binaries` holds the name, cubin and metadata of each kernel that was
    loaded.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.launches: list[Launched] = []
        self.binaries: list[tuple[str, bytes, Any]] = []
        self.utils = self

    # The methods of `driver.active`.
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a launcher of one compiled kernel, which only records its launches."""
        self._metadata = metadata
        launches, name = self.launches, metadata.name

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            launches.append(Launched(name, x * y * z, rest[4:]))

        return launch

    # The methods of `driver.active.utils`.
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.binaries.append((name, binary, self._metadata))
        return 1, 2, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.architecture], "multiprocessor_count": 132, "warpSize": 32}


@contextmanager
def fake_driver(architecture: int) -> Iterator[FakeDriver]:
    """Yield a driver that makes Triton compile for a compute capability, such as 90 for 9.0."""
    from karat_scale.attention.kernels import triton_backward, triton_forward, triton_launch, triton_psi

    kernels = [
        triton_psi.prepare_kernel,
        triton_forward.forward_kernel,
        triton_forward.readout_kernel,
        triton_backward.grad_query_kernel,
        triton_backward.grad_key_kernel,
        triton_psi.reduce_kernel,
        *triton_launch.PSI_KERNELS.values(),
    ]

    def forget() -> None:
        max_shared_mem.cache_clear()  # otherwise the next architecture gets this one's limit
        triton_launch._forward_plans.clear()
        triton_launch._backward_plans.clear()
        triton_launch._psi_launches.clear()
        for kernel in kernels:
            kernel.device_caches.clear()

    before, fake = driver._active, FakeDriver(architecture)
    forget()
    driver.set_active(fake)
    try:
        yield fake
    finally:
        # Kernels unload themselves through the active driver, so they are forgotten before it changes.
        forget()
        driver._active = before
