"""Speech and text in one model at the scale of slam.py: the paper's mix and spans, all of the text LM kept.

The paper's text-only tokens are of RedPajama; here they are the transcripts of the same utterances.

The paper: within its one day interleaving hurt (tStoryCloze 73.36 instead of 78.01). Not yet run here.
The unit files have words (docs/interleaving.md).
"""
from config.slam import *

out = "out/slam_interleaved"
train = ("out/words/train-clean-360",)  # more can be added: alignment reads any plain audio files
val = ("out/words/dev-clean",)
init = "keep_text"
rope_theta = None
mix = (1, 1, 1)  # speech only, text only, interleaved: as many tokens of each
spans = "poisson"
spoken_share = 0.3
dtype = "bfloat16"
micro_batch = 4
