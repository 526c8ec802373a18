"""The demo's unit LM: SmolLM2-135M cut to its first layers, trained for some minutes on two CPU cores."""
out = "out/demo/lm"
train = ("out/demo/data/units/train",)
val = ("out/demo/data/units/val",)
base = "embedded:smollm2-135m"
n_layers = 4
context = 1024
micro_batch = 2
accumulation = 1
time_budget_hours = 4 / 60
lr = 2e-3
min_lr = 1e-4
warmup = 0.05
clip = 1.0
log_every = 20
eval_every = 200
save_every = 100
