"""TWIST-350M by its original recipe on Slam's budget, one A5000 day: row "TWIST-350M, original recipe".

OPT-350M, speech of people only, inverse square root schedule. Slam's paper gives its results (sBLIMP
51.52, sStoryCloze 53.65, tStoryCloze 68.80), the schedule and 100 warm-up steps; batch and learning rate are TWIST's
(Hassid et al. 2023) as we remember them, not checked against it: 64 rows of up to 25 s, lr 1e-4. OPT's dropout is off,
as in Slam. Length: the day, so that it ends when Slam's does, whatever the GPU; by FLOPs at the paper's speed, 1.7B
tokens in 52,000 steps. 305.7M
parameters: with this context 18 % fewer FLOPs per token than slam.py. Peak memory: 8.9 GB counted by `dev/bench.py
memory`, as in gpu_24gb.py.
"""
from config.slam import *

out = "out/twist_opt350m"
train = ("out/units/libri_light", "out/units/librispeech")
base = "facebook/opt-350m"
context = 512  # 25 s at some 20 units a second
batch_tokens = 64 * 512
tokens = None
time_budget_hours = 23.5
lr = 1e-4
schedule = "inverse_sqrt"
warmup = 0.002  # 100 of some 52,000 steps
dtype = "bfloat16"
