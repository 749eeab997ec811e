"""Where bfloat16 pays: every training and evaluation script asks here.

A CPU without AVX-512 or AMX multiplies bfloat16 matrices about 80 times slower than float32 ones.
"""

import os
import warnings

import torch


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are at least as fast as in float32 on `"cpu"`, `"cuda"`,
    `"cuda:1"`, ...

    TOKCOM_BFLOAT16=fast or slow answers for the machine, so that a test can be any of them.
    """
    device_type = torch.device(device).type
    told = os.environ.get("TOKCOM_BFLOAT16")
    if told is not None:
        return told == "fast"
    if device_type == "cuda":
        # emulated bfloat16 is computed in float32, which gains nothing
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def half_precision(device_type: str) -> torch.autocast:
    """Autocast to bfloat16 where it is fast, and a context that does nothing elsewhere."""
    return torch.autocast(device_type, torch.bfloat16, enabled=has_fast_bfloat16(device_type))


def resolve_precision(name: str | None, device_type: str) -> str | None:
    """Accelerate's name for `mixed_precision`: `"auto"` is bf16 where it is fast; warns of a choice
    that is slow."""
    if name == "auto":
        return "bf16" if has_fast_bfloat16(device_type) else "no"
    if name == "bf16" and not has_fast_bfloat16(device_type):
        warnings.warn(
            f"mixed_precision=bf16 is many times slower than float32 on this {device_type}; use "
            "mixed_precision=auto.",
            stacklevel=2,
        )
    return name
