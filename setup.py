from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

HF = ["transformers>=5,<6", "safetensors"]
DATA = ["datasets>=4,<6", "pyarrow", "tokenizers"]  # the hub, .parquet files, and a tokenizer.json
DEV = [*HF, *DATA, "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"]


class FromCheckout(build_py):
    """Leaves the code out of a wheel: its folder `kernels` would hide Hugging Face's package of that name.

    The code is used from a checkout, which `pip install -e .` puts on Python's path.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = []


setup(
    name="tritongpt",
    version="0.1.0",
    description="nanoGPT rewritten for speed: Triton kernels behind a torch.compile'd GPT with DDP training",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords="GPT GPT-2 nanoGPT Triton CUDA kernels language model training torch.compile DDP",
    project_urls={"nanoGPT": "https://github.com/karpathy/nanoGPT"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["kernels", "gpt*", "train*", "bench*"]),
    cmdclass={"build_py": FromCheckout},
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
