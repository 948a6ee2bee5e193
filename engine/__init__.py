"""The PPO engine. Read ppo.py first, then batch.py, then roles.py."""
