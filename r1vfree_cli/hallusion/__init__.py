"""HallusionBench: questions, generation, judging, scores and their statistics."""
