"""What a token costs, and what a GPU could give: the two halves of MFU (model FLOPs utilisation)."""

# Dense 16-bit tensor-core peak with fp32 accumulation, in TFLOP/s, as the vendor publishes it, halved
# where that counts sparsity; for GeForce cards twice the fp32 rate. A100, H100 and H200 were compared
# with a second source; the others were written from memory and want a check before they are quoted.
# The longest name contained in the device's name counts, so "H100 PCIe" goes before "H100".
PEAK_TFLOPS = {
    "V100": 125, "V100 PCIE": 112, "T4": 65,
    "A100": 312, "A800": 312, "A30": 165, "A40": 149.7, "A10": 125, "A10G": 70, "RTX A6000": 154.8,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "H200 NVL": 835,
    "GH200": 989, "H20": 148,
    "L4": 121, "L40": 181, "L40S": 362, "RTX 6000 Ada": 364,
    "B200": 2250, "GB200": 2500,
    "RTX 3060": 25.5, "RTX 3060 Ti": 32.4, "RTX 3070": 40.6, "RTX 3070 Ti": 43.5,
    "RTX 3080": 59.5, "RTX 3080 Ti": 68.2, "RTX 3090": 71, "RTX 3090 Ti": 80,
    "RTX 4060": 30.2, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4070 SUPER": 71, "RTX 4070 Ti": 80.2,
    "RTX 4070 Ti SUPER": 88.2, "RTX 4080": 97.5, "RTX 4080 SUPER": 104.4, "RTX 4090": 165.2,
    "RTX 5070": 61.7, "RTX 5070 Ti": 87.9, "RTX 5080": 112.6, "RTX 5090": 209.5,
}  # fmt: skip
BEFORE_TF32 = {"V100", "V100 PCIE", "T4"}


def flops_per_token(n_params: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Floating-point operations of forward and backward for one token of a full context.

    `n_params` counts without position embeddings. Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311;
    as nanoGPT counts: attention at full T x T, although the causal half is never computed.
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s that a GPU (`torch.cuda.get_device_name()`) can give at most in `dtype`; None where unknown.

    "float32" is the TF32 peak, which is half the 16-bit one on every GPU that has it.
    """
    if any(word in device_name for word in ("Laptop", "Max-Q", "MIG")):  # same names, other chips
        return None
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_TFLOPS if _contains(words, name.split())]
    if not known:
        return None
    name = max(known, key=len)
    if dtype == "float32":
        return None if name in BEFORE_TF32 else PEAK_TFLOPS[name] * 1e12 / 2
    if dtype == "bfloat16" and name in BEFORE_TF32:
        return None
    return PEAK_TFLOPS[name] * 1e12


def _contains(words: list[str], name: list[str]) -> bool:
    return any(words[i : i + len(name)] == name for i in range(len(words)))
