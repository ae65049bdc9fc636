"""Packaging of nemo_selfpref. Versions are pinned where another one is known to break something."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    # The model, its parallel layers and schedules. Python 3.11 caps it at 0.16.1, whose own
    # checkpoint reader unpickles; we use its descriptions of shards and write safetensors
    # ourselves. 3.12 and later take one with that fixed.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.17.1; python_version >= '3.12'",
    # ModelPT, exp_manager. The core extra brings Lightning and Hydra; 2.7 works too.
    "nemo-toolkit[core]>=2.7.3,<3.1",
    "torch>=2.8",
    # Undeclared needs of NeMo's exp_manager and of megatron-core.
    "einops",
    "pandas",
    "psutil",
    "sentencepiece>=0.2",
    "omegaconf>=2.3,<2.4",
    "hydra-core>=1.3,<1.4",
    "transformers>=4.57,<6",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "pyarrow>=17",
    # Rollout servers and their clients; every record that travels is checked by pydantic.
    "fastapi>=0.115",
    "pydantic>=2.9,<3",
    "uvicorn>=0.30",
    "httpx>=0.27",
    "tenacity>=8",
    "rich>=13",
    "jinja2>=3.1.6",
    "numpy>=1.26",
    # Correlations for `selfpref correlate`; NeMo's core brings it only through scikit-learn.
    "scipy>=1.11",
]

EXTRAS = {
    # All of Transformer Engine or none of it: without its torch extension it installs an empty
    # package that makes `import megatron.core.models.gpt` fail.
    "gpu": ["transformer-engine[pytorch]>=2.8; platform_machine == 'x86_64'"],
    "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.12", "pyright[nodejs]>=1.1.400"],
}

# Folders of the project that an installed package has inside it.
APART = {"nemo_selfpref.conf": "conf", "nemo_selfpref.slurm": "slurm"}

setup(
    name="nemo-selfpref",
    version="0.1.0",
    description="Self-play preference optimisation of language models on Megatron and NeMo",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nemo_selfpref", "nemo_selfpref.*"]), *APART],
    package_dir=APART,
    package_data={
        "nemo_selfpref.conf": ["*.yaml", "*/*.yaml", "prompts/*.txt"],
        "nemo_selfpref.slurm": ["*.sh"],
        "nemo_selfpref.demo": ["prompts/*.txt"],
        "nemo_selfpref.objectives": ["*.json"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["selfpref = nemo_selfpref.cli:main"]},
)
