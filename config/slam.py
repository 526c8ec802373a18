"""Slam's pre-training on one 24 GB GPU in a day (paper, table 4): 17,625 steps of the paper's unfilled rows are about
1.4B tokens. Rows here are filled, so the run is given by its tokens, not its steps.
"""
out = "out/slam"
train = ("out/units/libri_light", "out/units/librispeech", "out/units/stinystories")
val = ("out/units/librispeech_dev",)
base = "Qwen/Qwen2.5-0.5B"
init = "first_rows"
rope_theta = 10000.0
context = 1024
micro_batch = 8
batch_tokens = 8 * 16 * 1024
tokens = 1.4e9
lr = 1e-3
min_lr = 5e-5
schedule = "cosine"
warmup = 0.01
clip = 0.5
