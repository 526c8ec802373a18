"""The demo's data: a quarter of an hour's listening is not the aim; two CPU cores' patience is the measure."""
out = "out/demo/data"
n_train = 300
n_val = 40
n_sblimp = 80
