"""Slam's preference tuning, the paper's table 5: 813 steps, half an hour on an A5000 there; 5M tokens.

9 GB of disk. The table has no warm-up; SlamKit's is 100 steps. `--time_budget_hours=0.5 --steps=none` fits the schedule
into half an hour on any card.
"""
out = "out/slam_dpo"
checkpoint = "out/slam"
pairs = "out/spoken_swag/pairs_train.jsonl"
val_pairs = "out/spoken_swag/pairs_val.jsonl"
beta = 0.1
context = 1024
batch_pairs = 4 * 16  # micro-batch x accumulation
steps = 813
warmup = 100 / 813
lr = 5e-5
schedule = "inverse_sqrt"
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0
grad_clip = 0.5
dtype = "bfloat16"
