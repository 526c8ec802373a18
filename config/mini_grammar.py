"""The shipped model's second step, over slam_fast.py and mini.py: training on tested grammar and new stories.

    python train.py config/slam_fast.py config/mini.py config/mini_grammar.py

One pass over a second set of sentences (config/mini_sentences.py with another seed) and part1's stories. The weights
before and after it, averaged and tuned with DPO once more, are embedded:slam-mini (docs/mini.md).
"""
train = ("out/mini/sentences2/units/train", "out/mini/part1/units/train")
base = "out/mini/half"
n_layers = None
init = "first_rows"
lr = 3e-3
tokens = 2_695_839
dtype = "auto"
out = "out/mini/more"
