"""Imports every algorithm of this package, which registers it."""

from nemo_selfpref.algorithms import (
    cdpo,
    dpo,
    ipo,
    orpo,
    osp,
    raft,
    rso,
    self_augmented_po,
    self_rewarding,
    sft,
    sgpo,
    spin,
    sr_dpo,
    sr_ipo,
)

__all__ = [
    "cdpo",
    "dpo",
    "ipo",
    "orpo",
    "osp",
    "raft",
    "rso",
    "self_augmented_po",
    "self_rewarding",
    "sft",
    "sgpo",
    "spin",
    "sr_dpo",
    "sr_ipo",
]
