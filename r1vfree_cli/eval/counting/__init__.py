"""Counting: R1-V's SuperCLEVR evaluation."""
