"""What a run is planned for: GPUs, the links between them, and their hosts.

Figures are the vendors' data sheets in decimal units; what a program reaches of them is in
seconds.py. Memory is what the driver offers, a little less than the name says.
"""

from dataclasses import dataclass

from gearshift.engine.config.errors import ConfigError, did_you_mean

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. Rates are per second and per direction."""

    memory: float  # bytes
    flops: float  # dense bf16
    bandwidth: float  # bytes, of its memory
    peer: float  # bytes, to the other GPUs of its node: NVLink, else PCIe
    host: float  # bytes, PCIe

    @property
    def workspace(self) -> int:
        """Bytes that PyTorch gives cuBLAS for every thread that multiplies."""
        return 32 << 20 if self.flops > 500e12 else 8320 << 10  # more from Hopper on


def _gpu(memory_gib: float, tflops: float, tb_s: float, peer_gb: float, host_gb: float) -> Gpu:
    return Gpu(
        memory=memory_gib * 2**30,
        flops=tflops * 1e12,
        bandwidth=tb_s * 1e12,
        peer=peer_gb * GB,
        host=host_gb * GB,
    )


# NVIDIA data sheets: memory GiB, dense bf16 TFLOP/s, memory TB/s, GB/s to peers, GB/s PCIe.
GPUS: dict[str, Gpu] = {
    "b200": _gpu(178, 2250, 8.0, 900, 64),
    "h200": _gpu(139.8, 989, 4.8, 450, 64),
    "h100": _gpu(79.2, 989, 3.35, 450, 64),
    "h100-nvl": _gpu(93, 835, 3.9, 300, 64),
    "a100-80": _gpu(79.2, 312, 2.04, 300, 32),
    "a100-40": _gpu(39.4, 312, 1.56, 300, 32),
    "l40s": _gpu(44.4, 362, 0.864, 32, 32),
    "rtx4090": _gpu(23.5, 165, 1.008, 32, 32),
    "rtx3090": _gpu(23.5, 71, 0.936, 32, 32),
}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes."""

    gpu: Gpu
    name: str
    gpus_per_node: int
    nodes: int
    host_bytes: float  # memory of one node
    shared: bool = False  # CPU ranks: their memory is the host's
    network: float = 50 * GB  # bytes per second per GPU between nodes: one 400 Gb/s port each

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU after context, communicators, workspaces and fragmentation.

        1.5 GB for CUDA and NCCL and 2 % of the memory: an estimate until measured.
        """
        if self.shared:
            return self.gpu.memory
        return 0.98 * self.gpu.memory - 1.5 * GB

    @property
    def usable_host(self) -> float:
        """Bytes of a node's memory after 3 GB per process (interpreter, CUDA's host side, pages of
        the files being read) and 4 GB for the system: an estimate until measured."""
        if self.shared:
            return self.host_bytes
        return self.host_bytes - 3 * GB * self.gpus_per_node - 4 * GB

    @property
    def link(self) -> float:
        """Bytes per second at which a rank takes part in a collective of the world."""
        if self.nodes > 1:
            return min(self.network, self.gpu.peer)
        return self.gpu.peer


def hardware(name: str, gpus: int, nodes: int, host_gb: float) -> Hardware:
    """Raises ConfigError for an unknown GPU or a number below 1. host_gb: of one node."""
    if name not in GPUS:
        fix = f"{did_you_mean(name, GPUS)} there are {', '.join(GPUS)}"
        raise ConfigError("--gpu", "unknown", fix.lstrip(), name)
    for option, count in (("--gpus", gpus), ("--nodes", nodes), ("--host-gb", host_gb)):
        if count < 1:
            raise ConfigError(option, "must be at least 1", value=count)
    return Hardware(
        gpu=GPUS[name], name=name, gpus_per_node=gpus, nodes=nodes, host_bytes=host_gb * GB
    )
