"""DPO of the study in miniature: one pass over mini_pairs.py's pairs (in runs/dpo_study.sh, seven passes did harm)."""
out = "out/mini/twist_9600000_0_dpo_0"
checkpoint = "out/mini/twist_9600000_0"
pairs = "out/mini/twist_9600000_0_own/pairs_train.jsonl"
val_pairs = "out/mini/twist_9600000_0_own/pairs_val.jsonl"
batch_pairs = 16
steps = 27
warmup = 0.1
lr = 2e-4
log_every = 5
eval_every = 1000
n_samples = 0  # eval.py, which runs next, generates samples
