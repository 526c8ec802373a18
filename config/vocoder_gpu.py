"""A vocoder of your own units on one GPU: a wider network, longer crops, ten hours."""
width = 384
blocks = 8
minutes = 600
batch = 32
crop_seconds = 1.92
lr = 5e-4
save_every = 5000
