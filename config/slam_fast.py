"""Slam's data and model, tuned for the least time to the paper's validation loss; figure and command in README.

What is different from slam.py: weights and optimiser in fp32 (pure bf16 loses most of the small steps at the schedule's
end), Muon for the blocks' matrices at three times the learning rate, a floor of 0. Rows are filled in both.

1.4B tokens at most; by FLOPs as long per token as slam.py. --time_budget_hours=12 --tokens=none makes it half a day. Peak
memory: config/gpu_24gb.py. Not yet run at full scale.
"""
from config.slam import *

out = "out/slam_fast"
dtype = "bfloat16"
optimizer = "muon"
lr = 3e-3
min_lr = 0.0
