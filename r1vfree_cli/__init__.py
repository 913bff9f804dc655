"""r1v: train vision-language models on open-ended questions, with another model's judgement as the reward."""

__version__ = "0.1.0"
