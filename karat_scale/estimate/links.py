"""How fast GPUs talk: within a node and between nodes, by kind of GPU.

Bandwidths are bytes a second in one direction. Sheets print NVLink in both directions together: half of that is here.
"""

from dataclasses import dataclass

GB = 1e9
# Bytes a second of PCIe 4.0 and 5.0 with 16 lanes, in one direction.
PCIE_4, PCIE_5 = 32 * GB, 64 * GB


@dataclass(frozen=True)
class Links:
    """`within`: a GPU's bandwidth to its node's others. `between`: its share of the node's network, one direction."""

    within: float
    between: float


# The share of the peak that NCCL reaches by rings: its maintainers state 370 of an H100's 450 GB/s (NVIDIA/nccl-tests
# issue 212). All-reduce through the switches themselves (NVLink SHARP) is faster, about 480, and is not counted on.
REACHED = 0.8
# Seconds a step of a ring or a tree takes however little it carries; NCCL's tuning tables (src/graph/tuning.cc) have
# 3.4 us a step of its simple protocol within a node, and 14 us across a network.
LATENCY_WITHIN, LATENCY_BETWEEN = 3.4e-6, 14e-6

# By the first word of a GPU's key. Data sheets: HGX B200 (NVLink 1.8 TB/s), H100 and H200 (900 GB/s), A100 (600 GB/s);
# DGX B200, H100 (8 x 400 Gb/s) and A100 (8 x 200 Gb/s) user guides for their networks.
_BY_FAMILY = {
    "b200": Links(900 * GB, 50 * GB),
    "gh200": Links(450 * GB, 50 * GB),
    "h200": Links(450 * GB, 50 * GB),
    "h100": Links(450 * GB, 50 * GB),
    "h100-pcie": Links(PCIE_5, 25 * GB),
    "h100-nvl": Links(PCIE_5, 25 * GB),
    "a100": Links(300 * GB, 25 * GB),
    "a100-pcie": Links(PCIE_4, 12.5 * GB),
    "v100": Links(150 * GB, 3.1 * GB),  # DGX-1: four ports of 100 Gb/s for eight
}
# No NVLink: PCIe, and a node of four or eight with two ports of 100 Gb/s.
_PLAIN = Links(PCIE_4, 3.1 * GB)


def links_of(key: str) -> Links:
    """The links of the GPU whose key this is, in the servers it is usually sold in."""
    return _BY_FAMILY.get(key.rpartition("-")[0], _PLAIN)
