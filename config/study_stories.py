"""Larger sets for work at a small scale: 1,500 stories with as many preference pairs, 500 tStoryCloze-style pairs (a
standard error of 2.2 points), and 1,000 sBLIMP-style ones (1.6 points). An hour on two CPU cores.

`python dev/hard_negatives.py out/study/stories` adds sStoryCloze-style pairs, with close wrong endings.
"""
out = "out/study/stories"
n_train = 1500
n_val = 500
n_pairs = 1500
n_sblimp = 1000
seed = 2000
