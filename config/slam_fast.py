"""Slam's data and model, tuned for the least time to the paper's validation loss.

What is different from slam.py: weights and optimiser in fp32 (in pure bf16 most of the small steps at the schedule's
end are lost), Muon for the blocks' matrices, three times the learning rate, beta2 0.95, and a schedule that stays at
the peak until its last fifth. Chosen at a small scale (docs/speed.md; runs/fast_study.sh), not yet run at this
one.

1.4B tokens at most; by FLOPs as long per token as slam.py. --time_budget_hours=12 --tokens=none makes it half a day.
Peak memory: config/gpu_24gb.py.
"""
from config.slam import *

out = "out/slam_fast"
dtype = "bfloat16"
optimizer = "muon"
lr = 3e-3
min_lr = 0.0
schedule = "wsd"
beta2 = 0.95
