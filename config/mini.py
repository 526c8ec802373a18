"""The study in miniature (runs/mini_slam.sh), over slam_fast.py or slam.py: a model that two CPU cores train.

    python train.py config/slam_fast.py config/mini.py --out=out/mini/by_hand --tokens=1.2e6 --lr=6e-3 --dtype=auto

Four layers of SmolLM2-135M, 14.5M parameters; a 32nd of slam.py's batch. The unit embeddings are drawn anew, because a
base cut in depth starts at 23 nats with the text's first rows.
"""
train = tuple(f"out/mini/part{k}/units/train" for k in range(12))
val = ("out/mini/part0/units/val/00000.safetensors",)  # some 20k tokens, to be quick; eval.py takes all of them
base = "embedded:smollm2-135m"
n_layers = 4
init = "random"
micro_batch = 4
batch_tokens = 4 * 1024
log_every = 10
eval_every = 100_000
save_every = 100
