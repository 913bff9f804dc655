"""Rewards: text rewards, AI feedback and its backends."""
