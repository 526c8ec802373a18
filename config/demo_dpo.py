"""The demo's preference tuning: a story's own next sentence against one of another story."""
out = "out/demo/dpo"
checkpoint = "out/demo/lm"
pairs = "out/demo/data/pairs_train.jsonl"
val_pairs = "out/demo/data/pairs_val.jsonl"
beta = 0.1
batch_pairs = 8
steps = 10
lr = 5e-5
warmup = 0.1
log_every = 5
n_samples = 0  # eval.py, which runs next, generates samples
