"""The shipped model's first step, over slam_fast.py and mini.py: more training, on sentences and other voices.

    python train.py config/slam_fast.py config/mini.py config/mini_voices.py

One pass over stories that another voice begins (dev/voices.py others) and sentences from templates
(config/mini_sentences.py). The weights before and after it, averaged, are the base of config/mini_grammar.py.
"""
train = ("out/mini/sentences/units/train", "out/mini/others/units")
base = "out/mini_gpu/twist_32000000_0_dpo_0/checkpoint"
n_layers = None
init = "first_rows"
lr = 3e-3
tokens = 2_970_000
dtype = "auto"
out = "out/mini/voices"
