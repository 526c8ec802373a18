"""Speech and text in one model on two CPU cores: the demo's stories with their words, all layers of SmolLM2-135M."""
out = "out/demo/interleaved"
train = ("out/demo/words/train",)
val = ("out/demo/words/val",)
base = "embedded:smollm2-135m"
init = "keep_text"
mix = (0.254, 0.202, 0.543)  # speech only, text only, interleaved
context = 1024
micro_batch = 1
batch_tokens = 4096
time_budget_hours = 0.25
lr = 5e-4
min_lr = 5e-5
warmup = 0.05
grad_clip = 1.0
log_every = 5
eval_every = 50
save_every = 25
