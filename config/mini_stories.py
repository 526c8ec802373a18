"""Stories for the study at a small scale (runs/mini_slam.sh): of eight to ten sentences, half a minute each.

The script makes several parts, with other seeds; the first one has the validation stories and the benchmark pairs.
"""
out = "out/mini/part0"
n_train = 1500
n_val = 600
n_pairs = 100
n_sblimp = 600
max_new_tokens = 120
max_sentences = 10
batch = 256
seed = 3000
