"""Slam's settings at a scale that two CPU cores afford (runs/fast_study.sh), over slam.py or slam_fast.py.

    python train.py config/slam.py config/study.py --seed=0

Two layers of SmolLM2-135M, 400k tokens of the demo pipeline's stories, a 32nd of the batch. Unit embeddings
are drawn anew for both: on a base cut in depth the text's first rows start at 23 nats.
"""
train = ("out/study/data/units/train",)
val = ("out/study/data/units/val",)
base = "embedded:smollm2-135m"
n_layers = 2
init = "random"
micro_batch = 4
batch_tokens = 4 * 1024
tokens = 4e5
time_budget_hours = None
log_every = 10
eval_every = 10_000
save_every = 10_000
