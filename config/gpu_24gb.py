"""24 GB (A5000, 3090, 4090): micro-batch 8. Given after a recipe: python train.py config/slam.py config/gpu_24gb.py

Presets change how a step is computed, not what it computes. Memory by `python dev/bench.py memory config/slam.py
config/gpu_24gb.py`, which counts weights, gradients, optimiser and what is kept for the backward pass, and does not
need a GPU; the allocator and the kernels come on top, torch.compile takes off. Not measured on these cards.

                          micro-batch   slam.py   slam_fast.py
    gpu_24gb.py                     8   15.3 GB        17.5 GB
    gpu_16gb.py                     4    9.1 GB        11.2 GB
    gpu_12gb.py                     2    6.0 GB         8.1 GB
    gpu_8gb.py   checkpointing      4    3.3 GB         4.9 GB, a third more work
"""
micro_batch = 8
