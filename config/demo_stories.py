"""The demo's data: an hour of stories, as much as two slow cores write, speak and tokenise in three minutes."""
out = "out/demo/data"
n_train = 150
n_val = 40
n_pairs = 80
n_sblimp = 60
