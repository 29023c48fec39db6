"""Which precision a machine is fast in."""

import torch


def resolve_precision(
    precision: str = "auto", device: str | torch.device | None = None
) -> torch.dtype:
    """The dtype of "fp32", "bf16" or "auto": bf16 on CUDA >= 8.0 or a CPU with AMX, else fp32.

    Raises
    ------
    ValueError
        precision is none of the three.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if precision != "auto":
        raise ValueError(f"precision: {precision!r} is none of auto, fp32, bf16")
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:  # avx512_bf16 alone is no faster than fp32
        fast = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.bfloat16 if fast else torch.float32
