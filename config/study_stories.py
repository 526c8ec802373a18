"""Larger sets for work at a small scale: 10 h of stories, 1,500 preference pairs, 500 tStoryCloze-style pairs and 1,000
sBLIMP-style ones, whose standard errors are 2.2 and 1.6 points. An hour on two CPU cores."""
out = "out/study/stories"
n_train = 1500
n_val = 500
n_pairs = 1500
n_sblimp = 1000
seed = 2000
