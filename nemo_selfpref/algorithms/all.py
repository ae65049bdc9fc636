"""Imports every algorithm of this package, which registers it."""

from nemo_selfpref.algorithms import dpo, ipo, orpo, sft, sgpo

__all__ = ["dpo", "ipo", "orpo", "sft", "sgpo"]
