"""nemo_selfpref: self-play preference optimisation on Megatron and NeMo."""

__version__ = "0.1.0"
