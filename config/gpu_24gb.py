"""24 GB (A5000, 3090, 4090): micro-batch 8. Name it after a recipe: python train.py config/slam.py config/gpu_24gb.py

Presets change how a step is computed, not its result. `python dev/bench.py memory config/slam.py config/gpu_24gb.py`
counts the memory of weights, gradients, optimiser and activations, without a GPU. Not measured on these cards; on an
H100, compiled, AdamW over fp32 weights took 15.3 GB where 18.9 GB are counted (docs/speed.md).

                          micro-batch   slam.py   slam_fast.py
    gpu_24gb.py                     8   15.3 GB        17.5 GB
    gpu_16gb.py                     4    9.1 GB        11.2 GB
    gpu_12gb.py                     2    6.0 GB         8.1 GB
    gpu_8gb.py   checkpointing      4    3.3 GB         4.9 GB, a third more work
"""
micro_batch = 8
