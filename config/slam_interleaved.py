"""Speech and text in one model at the scale of slam.py: SlamKit's ratios and spans, all of the text LM kept.

The ratios are here of tokens, there of samples of at most 2,048 tokens.

The paper: within its one day interleaving hurt (tStoryCloze 73.36 instead of 78.01). Not yet run here.
The unit files have words (docs/interleaving.md).
"""
from config.slam import *

out = "out/slam_interleaved"
train = ("out/words/train-clean-360",)  # and whatever else alignment can read: plain audio files
val = ("out/words/dev-clean",)
init = "keep_text"
rope_theta = None
mix = (0.254, 0.202, 0.543)  # speech only, text only, interleaved
spans = "poisson"
spoken_share = 0.3
dtype = "bfloat16"
micro_batch = 4
