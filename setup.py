"""Packaging of AR-Omni in JAX: a small core, and what only some need as extras."""

import pathlib

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "array_record>=0.8; sys_platform != 'win32'",
    "beartype>=0.18",
    "espeakng-loader>=0.2",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3",
    "ml-collections>=1.0",
    "msgpack>=1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "Pillow>=11",
    "safetensors>=0.5",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "sentencepiece>=0.2",
    "soundfile>=0.12",
    "tensorboardX>=2.6",
    "tensorstore>=0.1.70",
]
EVAL = ["jiwer>=3.0", "pystoi>=0.4"]
# Corpora that lie in Parquet or Arrow tables, or in zstd.
DATA = ["pyarrow>=17", "zstandard>=0.22"]
# Corpora behind URLs: any that fsspec reads; gs:// and s3:// each need their own library.
URLS = ["fsspec>=2025.2", "universal_pathlib>=0.3"]
# Prepared builders of TensorFlow Datasets; TensorFlow itself is not needed.
TFDS = ["tensorflow-datasets>=4.9.10", "importlib_resources"]
# The TPU compiler, which needs no TPU: the tests compile the train step for pods with it.
TPU_COMPILER = ["libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"]
HF = ["tokenizers>=0.21", "transformers>=5.0", "torch==2.13.0"]

setup(
    name="aromni-jax",
    version="0.1.0",
    description="AR-Omni in JAX: one autoregressive decoder over text, image and speech tokens, trained on TPU pods",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["aromni_jax*", "configs*", "data_pipelines*", "launch*"]),
    package_data={
        "aromni_jax": [
            "ARCHITECTURE.md",
            "tokenizers/templates/*.json",
            "tokenizers/weights/*.json",
            "tokenizers/weights/*/*",
            "evaluation/assets/*",
        ],
        "configs": ["LOG.md"],
        "launch": ["*.sh", "*.sbatch", "*.yaml", "Dockerfile"],
    },
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "serve": [],
        "tfds": TFDS,
        "data": DATA,
        "cloud": [*URLS, "gcsfs", "s3fs"],
        "eval": EVAL,
        "hf": HF,
        "dev": [
            *DATA,
            *EVAL,
            *HF,
            *TFDS,
            *TPU_COMPILER,
            *URLS,
            "hypothesis>=6",
            "mypy>=1.14",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "PyYAML>=6",
            "ruff>=0.9",
            "webdataset>=0.2",
        ],
    },
    entry_points={"console_scripts": ["aromni = launch.cli:main"]},
)
