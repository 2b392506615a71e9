from setuptools import find_namespace_packages, setup

HF = ["transformers>=5,<6", "safetensors"]
DATA = ["datasets>=4,<6", "tokenizers"]
DEV = [*HF, *DATA, "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"]

setup(
    name="tritongpt",
    version="0.1.0",
    description="nanoGPT rewritten for speed: Triton kernels behind a torch.compile'd GPT with DDP training",
    license="MIT",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["kernels", "gpt*", "train*", "bench*"]),
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy",
        "tiktoken",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "hf": HF,
        "data": DATA,
        "flash": ["flash-attn"],
        "wandb": ["wandb"],
        "test": DEV,
    },
)
