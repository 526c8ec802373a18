"""The demo's data: an hour and a half of stories, as much as two cores write, speak and tokenise in four minutes."""
out = "out/demo/data"
n_train = 210
n_val = 40
n_pairs = 120
n_sblimp = 80
