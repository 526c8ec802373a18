"""Slam (large) before DPO: Qwen2.5-1.5B, 1.3B parameters without its text embeddings, 6.1B tokens on two A100s.

    torchrun --nproc_per_node=2 train.py config/slam_large.py
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py --checkpoint=out/slam_large --out=out/slam_large_dpo

All else is as in slam_scaled.py (the paper: "All training details are identical"). Peak memory of a GPU: 62.5 GB,
counted by `dev/bench.py memory` as in gpu_24gb.py.
"""
from config.slam_scaled import *

out = "out/slam_large"
base = "Qwen/Qwen2.5-1.5B"
tokens = 6.1e9
