"""Preference pairs of the study in miniature: its best model's own continuations (AlignSLM) of training stories."""
out = "out/mini/twist_9600000_0_own"
checkpoint = "out/mini/twist_9600000_0"
prompts = "out/mini/part0/units/train"
n_prompts = 500
n_val = 50
n = 4
new_units = 100
temperature = 0.9
min_gap = 0.3
allow_eos = False  # as in mini_eval.py
