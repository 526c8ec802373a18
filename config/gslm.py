"""Slam without a text LM: the same shape, data and budget, all weights drawn anew (the paper's models without TWIST).

1.4B tokens; hours and memory as slam.py.
"""
from config.slam import *

out = "out/gslm"
init = "none"
