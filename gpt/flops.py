"""The peak FLOP/s of GPUs, by which MFU (model FLOPs utilisation) is measured."""

# Dense 16-bit tensor-core peak with fp32 accumulation, in TFLOP/s, as the vendor publishes it; halved if the
# vendor counts sparsity. Compared with other tables of the datasheets, such as Lightning's, nanochat's and
# verl's. For GeForce cards it is twice the fp32 rate: 4 * CUDA cores * boost clock.
# The longest name contained in the device's name is used, so "H100 PCIe" wins over "H100".
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


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The peak FLOP/s in `dtype` of a GPU, by its `torch.cuda.get_device_name()`. None if it is unknown.

    "float32" means TF32, which runs at half the 16-bit rate on every GPU that has it.
    """
    # These have the names of faster GPUs.
    if any(word in device_name for word in ("Laptop", "Max-Q", "MIG")):
        return None
    words = device_name.replace("-", " ")
    known = [name for name in PEAK_TFLOPS if f" {name} " in f" {words} "]
    if not known:
        return None
    name = max(known, key=len)
    if dtype == "float32":
        return None if name in BEFORE_TF32 else PEAK_TFLOPS[name] * 1e12 / 2
    if dtype == "bfloat16" and name in BEFORE_TF32:
        return None
    return PEAK_TFLOPS[name] * 1e12
