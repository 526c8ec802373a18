"""Slam (scaled) before DPO: the day's recipe with twice the batch on two A100s for 48 h, 16.7B tokens in the paper.

    torchrun --nproc_per_node=2 train.py config/slam_scaled.py

On an A5000 it would take 12 days: it has 12 times slam.py's tokens. Peak memory of a GPU: 27.7 GB, counted by
`dev/bench.py memory` as in gpu_24gb.py. After a signal, torchrun leaves 30 s for the step and the save; if it kills the
run, --resume continues from the last save.
"""
from config.slam import *

out = "out/slam_scaled"
micro_batch = 16
batch_tokens = 2 * 8 * 16 * 1024
tokens = 16.7e9
