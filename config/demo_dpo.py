"""The demo's preference tuning: a story's own next sentence against one of another story."""
out = "out/demo/dpo"
checkpoint = "out/demo/lm"
pairs = "out/demo/data/pairs_train.jsonl"
val_pairs = "out/demo/data/pairs_val.jsonl"
beta = 0.1
micro_batch = 4
accumulation = 2
steps = 20
time_budget_hours = None
lr = 5e-5
warmup = 0.1
log_every = 5
