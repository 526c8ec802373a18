"""Slam (scaled), its preference tuning: two epochs of SpokenSwag in batches twice as large, 9M tokens.

    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py
"""
from config.slam_dpo import *

out = "out/slam_scaled_dpo"
checkpoint = "out/slam_scaled"
batch_pairs = 2 * 4 * 16
steps = 2 * 47_900 // batch_pairs
warmup = 100 / steps
