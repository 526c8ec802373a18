"""The shipped model's second step, over slam_fast.py and mini.py: the study's best goes on, on sentences and voices.

    python train.py config/slam_fast.py config/mini.py config/mini_voices.py

Stories that another voice begins (dev/voices.py others) and sentences from templates (config/mini_sentences.py), once.
Half of the weights after it and half of those before it are what config/mini_grammar.py goes on from (docs/mini.md).
"""
train = ("out/mini/sentences/units/train", "out/mini/others/units")
base = "out/mini_gpu/twist_32000000_0_dpo_0/checkpoint"
n_layers = None
init = "first_rows"
lr = 3e-3
tokens = 2_970_000
dtype = "auto"
out = "out/mini/voices"
