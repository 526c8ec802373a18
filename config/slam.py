"""Slam's pre-training, the paper's row -DPO, settings of table 4: one day on one 24 GB GPU.

1.4B tokens; 23.5 h on an A5000 in the paper, in 17,625 steps of 128 chunks of about 620 tokens. Our rows are filled, so
a run has 10,700 steps of 131,000 tokens. Peak memory: config/gpu_24gb.py. Weights and optimiser are in bfloat16, as in
SlamKit's `model=slam`; --dtype=bfloat16 keeps them in fp32, as slam_fast.py does. The paper's validation loss, 1.64 to
1.67, is on 1 % of Libri-Light, dev-clean and dev-other; put all three into val to compare.
"""
out = "out/slam"
train = ("out/units/libri_light", "out/units/librispeech", "out/units/stinystories")
val = ("out/units/librispeech_dev",)
base = "Qwen/Qwen2.5-0.5B"
init = "first_rows"
rope_theta = 10000.0
context = 1024
micro_batch = 8
batch_tokens = 8 * 16 * 1024  # micro-batch x accumulation x context
tokens = 1.4e9
optimizer = "adamw"
lr = 1e-3
min_lr = 5e-5
schedule = "cosine"
warmup = 0.01
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0
grad_clip = 0.5
dtype = "pure_bfloat16"
