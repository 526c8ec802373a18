"""Larger sets for work at a small scale: 1,500 stories with as many preference pairs, 500 tStoryCloze-style pairs (a
standard error of 2.2 points), as many sStoryCloze-style ones with close wrong endings, and 1,000 sBLIMP-style ones (1.6
points). An hour on two CPU cores."""
out = "out/study/stories"
n_train = 1500
n_val = 500
n_pairs = 1500
n_sblimp = 1000
hard_negatives = True
seed = 2000
