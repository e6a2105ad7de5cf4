"""Training: config and recipes, the engine (DeepSpeed or plain torch), the loop, checkpoints.

Reading order: `config`, `recipes`, `loop`, `engine`, `checkpoint`. Run it as `python -m fastclip.training`.
"""
