"""What GRPO is rewarded by: text rewards, AI feedback, users' own; canaries. Imports judges and below."""
