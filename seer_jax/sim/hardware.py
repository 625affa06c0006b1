"""Accelerators, by their public data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator; the peaks of its data sheet, dense, that is without structured sparsity.

    Attributes:
        name: Key in `CHIPS`.
        memory_bytes: High-bandwidth memory.
        memory_bytes_per_s: Its bandwidth.
        flops_per_s: bfloat16 operations.
        fp8_flops_per_s: 8-bit floating point operations; the bfloat16 figure where the chip has none.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    fp8_flops_per_s: float


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # NVIDIA H100 data sheet, SXM. The H800 is the H100 with slower NVLink (400 GB/s) and float64.
        Chip(name="h800", memory_bytes=80e9, memory_bytes_per_s=3.35e12, flops_per_s=989e12, fp8_flops_per_s=1979e12),
        Chip(name="h100", memory_bytes=80e9, memory_bytes_per_s=3.35e12, flops_per_s=989e12, fp8_flops_per_s=1979e12),
        # NVIDIA H200 data sheet, SXM.
        Chip(name="h200", memory_bytes=141e9, memory_bytes_per_s=4.8e12, flops_per_s=989e12, fp8_flops_per_s=1979e12),
        # Google Cloud TPU documentation, "System architecture", pages of v5p, v6e and v5e.
        Chip(
            name="tpu_v5p", memory_bytes=95e9, memory_bytes_per_s=2.765e12, flops_per_s=459e12, fp8_flops_per_s=459e12
        ),
        Chip(name="tpu_v6e", memory_bytes=32e9, memory_bytes_per_s=1.64e12, flops_per_s=918e12, fp8_flops_per_s=918e12),
        Chip(
            name="tpu_v5e", memory_bytes=16e9, memory_bytes_per_s=0.819e12, flops_per_s=197e12, fp8_flops_per_s=197e12
        ),
    )
}
"""Chips by name."""
