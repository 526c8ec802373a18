"""The demo's unit LM: SmolLM2-135M cut to its first four layers; one to three minutes on two CPU cores.

Chosen by measurement: validation loss after 1.5 minutes on two cores and two hours of stories (a bigram model: 1.70)
    from scratch, 6 layers, 256 wide, 5.2M parameters                    1.43
    from scratch, the shape of this one, 14.5M                           1.51
    TWIST, 4 layers, unit embeddings from the text embedding's first rows  1.46
    TWIST, 2 layers, the same, 7.4M                                      1.29
    TWIST, 4 layers, random unit embeddings                              1.29
    TWIST, 4 layers, random unit embeddings, one row a step instead of two  1.25  <- this one
"""
out = "out/demo/lm"
train = ("out/demo/data/units/train",)
val = ("out/demo/data/units/val",)
base = "embedded:smollm2-135m"
init = "random"
n_layers = 4
context = 1024
micro_batch = 1
batch_tokens = 1024
tokens = 220_000  # three epochs; seven (what two minutes on a fast machine allow) overfit: the loss is 0.2 higher
lr = 2e-3
min_lr = 1e-4
warmup = 0.05
grad_clip = 1.0
log_every = 25
eval_every = 200
save_every = 100
