#!/usr/bin/env bash
# Slam (scaled): slam.sh on two GPUs, 16.7B tokens in 48 h on two A100s. Steps and variables are those of slam.sh.
SCALE=scaled exec bash "$(dirname "$0")/slam.sh" "$@"
