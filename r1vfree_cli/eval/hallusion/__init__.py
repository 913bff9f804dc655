"""HallusionBench: questions, judging, scores."""
