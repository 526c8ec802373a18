"""Slam's preference tuning (paper, table 5): half an hour on one 24 GB GPU, about 813 steps."""
out = "out/slam_dpo"
checkpoint = "out/slam"
pairs = "out/spoken_swag/pairs_train.jsonl"
val_pairs = "out/spoken_swag/pairs_val.jsonl"
beta = 0.1
micro_batch = 4
accumulation = 16
time_budget_hours = 0.5
lr = 5e-5
schedule = "inverse_sqrt"
clip = 0.5
