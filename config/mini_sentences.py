"""Sentences beside the stories (runs/mini_slam.sh), from templates: the grammar that stories hardly use.

Agreement of subject and verb, of determiner and noun, reflexives, word order: what the sBLIMP-style pairs test, in
other sentences. None of their sentences can be made of assets/sentences.json.
"""
out = "out/mini/sentences"
openings = "assets/sentences.json"  # a story is eight of its sentences
max_new_tokens = 0
max_sentences = 8
n_train = 3000
n_val = 200
n_pairs = 4
n_sblimp = 4
batch = 256
seed = 3100
