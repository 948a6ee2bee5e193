"""Entry points: `deepspeed launch/train.py` and the `gearshift` command."""
