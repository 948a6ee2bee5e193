"""Run on ranks: the main job, as a launcher would start it.

torchrun --nproc_per_node W train_on_ranks.py ARGUMENTS OF train.py
"""

import sys

from gearshift.launch import train

if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
